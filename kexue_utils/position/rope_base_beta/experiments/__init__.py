"""Recorded runs of the chapter: copying with a toy model, and a byte-level language model."""

from .induction import INDUCTION
from .text import TEXT

__all__ = ["INDUCTION", "TEXT"]
