"""Recorded runs of the chapter: small models under Tiger and its neighbours, memory, several processes."""

from .decay import DECAY
from .digits import DIGITS
from .grids import BETA, HALF, LONG
from .memory import MEMORY
from .ranks import RANKS
from .text import TEXT
from .widths import WIDTH

__all__ = ["BETA", "DECAY", "DIGITS", "HALF", "LONG", "MEMORY", "RANKS", "TEXT", "WIDTH"]
