"""Recorded runs of the chapter: language models under Tiger and its neighbours, memory, several processes."""

from .grids import BETA, HALF, LONG
from .memory import MEMORY
from .ranks import RANKS
from .text import TEXT
from .widths import WIDTH

__all__ = ["BETA", "HALF", "LONG", "MEMORY", "RANKS", "TEXT", "WIDTH"]
