"""Tiger: sign of the momentum, one buffer, gradient accumulation hidden in it.

Source: 《Tiger：一个“抠”到极致的优化器》, Jianlin Su, https://kexue.fm/archives/9512
"""

from .groups import piecewise_linear, tiger_param_groups
from .optimizer import Tiger
from .precision import absorbed, adam_displacement, frozen_fraction, momentum_stall
from .runaway import constant_sign, runaway, runaway_time, smooth_beta
from .update import accumulate_, direction, rate, rms, shrink_, step_, stochastic_round

__all__ = [
    "Tiger",
    "absorbed",
    "accumulate_",
    "adam_displacement",
    "constant_sign",
    "direction",
    "frozen_fraction",
    "momentum_stall",
    "piecewise_linear",
    "rate",
    "rms",
    "runaway",
    "runaway_time",
    "shrink_",
    "smooth_beta",
    "step_",
    "stochastic_round",
    "tiger_param_groups",
]
