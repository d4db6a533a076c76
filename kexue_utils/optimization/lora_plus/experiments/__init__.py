"""Recorded runs of the chapter: how the best rates scale with the width, and what their ratio is worth."""

from .finetune import FINETUNE
from .tiger import TIGER
from .widths import WIDTHS

__all__ = ["FINETUNE", "TIGER", "WIDTHS"]
