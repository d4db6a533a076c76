"""Rotary positions as a base-β numeral system, and how to stretch it.

Source: 《Transformer升级之路：11、将β进制位置进行到底》, Jianlin Su, https://kexue.fm/archives/9706
"""

from .digits import digits, phase_digits, undigits
from .dilution import (
    entropy_preserving_scale,
    frozen_entropy,
    gaussian_entropy,
    logn_scale,
    needle_probability,
)
from .frequencies import (
    METHODS,
    attention_factor,
    cumulative_stretch,
    dynamic_scale,
    rope_inv_freq,
    yarn_attention_factor,
)
from .kernel import mean_kernel, mean_kernel_limit
from .modules import RopeAttention, RotaryEmbedding
from .rotation import LAYOUTS, apply_rope, rope_matrix, rope_tables, rotate

__all__ = [
    "LAYOUTS",
    "METHODS",
    "RopeAttention",
    "RotaryEmbedding",
    "apply_rope",
    "attention_factor",
    "cumulative_stretch",
    "digits",
    "dynamic_scale",
    "entropy_preserving_scale",
    "frozen_entropy",
    "gaussian_entropy",
    "logn_scale",
    "mean_kernel",
    "mean_kernel_limit",
    "needle_probability",
    "phase_digits",
    "rope_inv_freq",
    "rope_matrix",
    "rope_tables",
    "rotate",
    "undigits",
    "yarn_attention_factor",
]
