"""Recorded runs of the chapter."""

from .memory import MEMORY

__all__ = ["MEMORY"]
