"""What the options of a parameter group may be."""

import math
import warnings
from numbers import Integral, Real

import torch
from torch import Tensor

from . import fused
from .reductions import is_sharded
from .update import LR_SCALES

NAN_POLICIES = ("shrink", "skip", "raise", "off", "official")


def _require_number(group, name, rule, holds):
    value = group[name]
    if isinstance(value, Tensor) and name == "lr" and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {group[name]!r}")


def require_steps(k):
    """Raise unless k is a number of micro-batches."""
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ValueError(f"accumulation_steps must be an integer >= 1, got {k!r}")


def require(group):
    """Raise unless every option of the group is allowed."""
    _require_number(group, "lr", "a finite number >= 0", lambda x: 0 <= x < math.inf)
    _require_number(group, "beta", "in [0, 1)", lambda x: 0 <= x < 1)
    _require_number(group, "weight_decay", "a finite number >= 0", lambda x: 0 <= x < math.inf)
    _require_number(group, "rms_floor", "a finite number >= 0", lambda x: 0 <= x < math.inf)
    _require_number(group, "shrink_ratio", "in (0, 1]", lambda x: 0 < x <= 1)
    _require_number(group, "sign_power", "in [0, 1]", lambda x: 0 <= x <= 1)
    _require_number(group, "center", "a finite number", math.isfinite)
    require_steps(group["accumulation_steps"])
    for name, choices in (("lr_scale", LR_SCALES), ("nan_policy", NAN_POLICIES)):
        if group[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {group[name]!r}")
    dtype = group["momentum_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"momentum_dtype must be a floating-point dtype or None, got {dtype!r}")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach and fused must not both be True")
    for theta in group["params"]:
        shape = tuple(theta.shape)
        if theta.is_complex():
            raise RuntimeError(f"Tiger has no sign of a complex number: got a {theta.dtype} parameter of shape {shape}")
        if group["lr_scale"] == "row_rms" and theta.ndim < 1:
            raise ValueError(f"lr_scale 'row_rms' needs at least 1 dimension, got a parameter of shape {shape}")
        if group["lazy_rows"] and (theta.ndim < 2 or is_sharded(theta)):
            raise ValueError(f"lazy_rows needs unsharded parameters of >= 2 dimensions, got one of shape {shape}")
        if group["fused"] and not fused.supports(theta, group):
            raise RuntimeError(
                "fused=True needs Triton, dense CUDA parameters in float64, float32, bfloat16 or float16, and not "
                f"lazy_rows, got {theta.dtype} of shape {shape} on {theta.device}"
            )


def warn_about_zeros(group, new):
    """Say which of these parameters the rule for the rate will never move."""
    if group["lr_scale"] not in ("rms", "row_rms") or group["rms_floor"] > 0:
        return
    new = [p for p in new if not is_sharded(p) and p.numel()]
    if not new or (new[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    for p, moves in zip(new, [bool(p.any()) for p in new], strict=True):
        if not moves:
            warnings.warn(
                f"a parameter of shape {tuple(p.shape)} is all zero: with lr_scale {group['lr_scale']!r} and "
                "rms_floor=0 it never moves; set rms_floor, for example to 1e-3",
                stacklevel=5,
            )
