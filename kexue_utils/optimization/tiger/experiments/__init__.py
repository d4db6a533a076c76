"""Recorded runs of the chapter: language models trained by Tiger and its neighbours."""

from .text import TEXT

__all__ = ["TEXT"]
