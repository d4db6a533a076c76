"""Recorded runs of the chapter."""

from .memory import MEMORY
from .ranks import RANKS

__all__ = ["MEMORY", "RANKS"]
