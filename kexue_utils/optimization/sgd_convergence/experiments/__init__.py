"""Recorded runs of the chapter: a million runs of SGD against the bound, and schedules on a small language model."""

from .regret import REGRET
from .schedules import ADAMW, SGD

__all__ = ["ADAMW", "REGRET", "SGD"]
