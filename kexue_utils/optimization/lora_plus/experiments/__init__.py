"""Recorded runs of the chapter: how the best rates scale with the width, and what their ratio is worth."""

from .finetune import FINETUNE
from .widths import WIDTHS

__all__ = ["FINETUNE", "WIDTHS"]
