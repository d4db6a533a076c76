"""Chapters on optimization."""

from .tiger import Tiger, tiger_param_groups

__all__ = ["Tiger", "tiger_param_groups"]
