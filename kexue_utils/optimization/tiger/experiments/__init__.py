"""Recorded runs of the chapter: language models trained by Tiger and its neighbours."""

from .grids import BETA, HALF, LONG
from .text import TEXT
from .widths import WIDTH

__all__ = ["BETA", "HALF", "LONG", "TEXT", "WIDTH"]
