"""Recorded runs of the chapter: a million runs of SGD against the bound, and schedules on a small language model."""

from .regret import REGRET

__all__ = ["REGRET"]
