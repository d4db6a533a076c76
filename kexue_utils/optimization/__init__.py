"""Chapters on optimization."""

from .tiger import Tiger

__all__ = ["Tiger"]
