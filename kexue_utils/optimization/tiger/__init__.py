"""Tiger: sign of the momentum, one buffer, gradient accumulation hidden in it.

Source: 《Tiger：一个“抠”到极致的优化器》, Jianlin Su, https://kexue.fm/archives/9512
"""

from .groups import piecewise_linear, tiger_param_groups
from .optimizer import Tiger

__all__ = ["Tiger", "piecewise_linear", "tiger_param_groups"]
