"""Which rule a parameter follows, and the schedule of the official code."""

import re
from collections.abc import Mapping

from torch import nn

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
RULES = ("module", "official")


def _is_norm(module):
    # Transformer libraries have classes of their own for norms, all of them called so.
    return isinstance(module, _NORMS) or type(module).__name__.lower().endswith("norm")


def _by_module(module, name, theta):
    norm = _is_norm(module) and (theta.ndim == 1 or isinstance(module, _NORMS))  # LayerNorm((H, W)) has matrices
    if "bias" in name and (norm or theta.ndim <= 1):  # also in_proj_bias, bias_ih_l0
        return "half", 0.0, 0.0
    if norm:
        # A gain that starts at 0 belongs to a norm that multiplies with 1 + gain.
        zero = not theta.is_meta and not bool(theta.any())
        return "half", 0.0, 0.0 if zero else 1.0
    return ("row_rms" if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else "rms"), None, 0.0


def _by_name(full_name):
    if re.search("bias|beta|gamma", full_name):
        return "half", 0.0, float("gamma" in full_name)
    return ("row_rms" if "embeddings" in full_name else "rms"), None, 0.0


def tiger_param_groups(
    model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01, *, rule: str = "module"
) -> list[dict]:
    """Parameter groups for :class:`Tiger` by the kind of parameter   (tiger-rate)

    | parameter                        | lr_scale      | weight_decay | center |
    |----------------------------------|---------------|--------------|--------|
    | bias                             | ``"half"``    | 0            | 0      |
    | gain of a norm                   | ``"half"``    | 0            | 1 (0 if it starts at 0) |
    | embedding                        | ``"row_rms"`` | given        | 0      |
    | the rest                         | ``"rms"``     | given        | 0      |

    rule: ``"module"`` goes by the type of the module that owns the parameter (a class whose name ends with "norm"
    is one), ``"official"`` by names, as the official code does: bias, beta, gamma and embeddings anywhere in it.
    A tied weight appears once, as the embedding that it is. Frozen parameters are left out. Names go along, so that
    an error can name the parameter. Raises ValueError for an unknown rule or a model without trainable parameters.
    Source: https://github.com/bojone/tiger
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    found = {}  # parameter: name and kind
    for prefix, module in model.named_modules():
        for name, theta in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            kind = _by_module(module, name, theta) if rule == "module" else _by_name(full_name)
            if theta.requires_grad and (theta not in found or kind[0] == "row_rms"):
                found[theta] = (found.get(theta, (full_name,))[0], kind)
    if not found:
        raise ValueError("model must have parameters that require gradients, got none")
    groups = {}
    for theta, (name, kind) in found.items():
        groups.setdefault(kind, []).append((name, theta))
    return [
        {
            "params": members,
            "lr": lr,
            "lr_scale": lr_scale,
            "weight_decay": weight_decay if decay is None else decay,
            "center": center,
        }
        for (lr_scale, decay, center), members in groups.items()
    ]


def piecewise_linear(t: float, schedule: Mapping[int, float], from_zero: bool = True) -> float:
    """Piecewise-linear schedule: through (t_i, x_i), constant after the last knot   (tiger-schedule)

    schedule: {t_i: x_i}; a knot (0, 0) is added unless there is one at 0 or ``from_zero`` is False, when x is x_1
    before the first knot. The official code evaluates it at the 0-based number of the *micro*-batch that ends a
    cycle, t = ck − 1: with k = 4, "40000" are 10000 updates. For ``LambdaLR``, ``partial(piecewise_linear,
    schedule=...)``. Raises ValueError for an empty schedule, negative t or negative knots.
    Source: https://github.com/bojone/tiger
    """
    if not schedule or min(schedule) < 0:
        raise ValueError(f"schedule must have knots, none of them negative, got {dict(schedule)}")
    if not t >= 0:
        raise ValueError(f"t must not be negative, got {t}")
    knots = sorted(schedule.items())
    if from_zero and knots[0][0] != 0:
        knots.insert(0, (0, 0.0))
    if t <= knots[0][0]:
        return knots[0][1]
    for (t0, x0), (t1, x1) in zip(knots, knots[1:], strict=False):
        if t <= t1:
            return x0 + (x1 - x0) * (t - t0) / (t1 - t0)
    return knots[-1][1]
