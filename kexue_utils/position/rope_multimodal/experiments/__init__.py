"""Recorded runs: patches of unseen shapes, text through multimodal positions, pixels that a text asks for."""

from .digits import DIGITS
from .shapes import SHAPES
from .text import TEXT

__all__ = ["DIGITS", "SHAPES", "TEXT"]
