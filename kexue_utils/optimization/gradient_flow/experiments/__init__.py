"""Recorded runs: the bias of Langevin steps, particles with a learned score, descent at the edge of stability."""

from .langevin_bias import BIAS

__all__ = ["BIAS"]
