"""Recorded runs: the bias of Langevin steps, particles with a learned score, descent at the edge of stability."""

from .edge_of_stability import EDGE
from .langevin_bias import BIAS
from .score_flow import SCORE

__all__ = ["BIAS", "EDGE", "SCORE"]
