"""Adapters all over a model: put in, merged, saved, loaded, and given their learning rates.

Sources: E. Hu et al., arXiv:2106.09685; S. Hayou, N. Ghosh, B. Yu, arXiv:2402.12354
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .linear import LoRALinear, require_wrappable

Target = str | re.Pattern | Callable[[str, nn.Module], bool]
FACTORS = ("lora_A", "lora_B", "start_A", "start_B")


def _adapters(model):
    """{name: LoRALinear}; ValueError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("model has no adapters: inject LoRA first")
    return found


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _matcher(target):
    if isinstance(target, str):
        return lambda name, module: name == target or name.endswith(f".{target}")
    if isinstance(target, re.Pattern):
        return lambda name, module: target.fullmatch(name) is not None
    if callable(target):
        return target
    raise TypeError(f"target must be a string, a compiled pattern or a function, got {type(target).__name__}")


def _shared(model, weight):
    return sum(weight is p for module in model.modules() for p in module.parameters(recurse=False)) > 1


def _wrapped(chosen, r, alpha, options):
    """{module: its adapter}; where one of them can't begin at its weight, all weights are as they were."""
    adapted, before = {}, []
    for name, module in chosen.items():
        if module in adapted:
            continue
        if options.get("init") == "both":  # the only start that changes a weight
            before.append((module.weight, module.weight.requires_grad, module.weight.detach().clone()))
        try:
            adapted[module] = LoRALinear.wrap(module, r, alpha, **options).train(module.training)
        except ValueError as error:
            for weight, trained, value in before:
                with torch.no_grad():
                    weight.copy_(value)
                weight.requires_grad_(trained)
            raise ValueError(f"module {name!r}: {error}") from None
    return adapted


def inject_lora(model: nn.Module, target: Target, r: int, alpha: float | None = None, *, freeze: bool = True,
                **options) -> list[str]:  # fmt: skip
    """Replace linear layers of `model` by :class:`LoRALinear`s in place; the names of those that were replaced.

    target: a string (a layer's name or its end from a dot on: ``"fc"`` is ``"fc"`` and ``"blocks.0.fc"``), a compiled
    pattern (of the whole name), or a function (name, nn.Linear) → bool. r, alpha, options: as in
    :meth:`LoRALinear.wrap`. freeze: nothing but factors, those of earlier calls too, requires gradients afterwards.
    A layer that stands in several places is adapted once. Only nn.Linear itself counts as linear: a subclass, such as
    the output of nn.MultiheadAttention, may be read in other ways than by calling it.
    Raises ValueError, with the names that there are, if nothing matches; for a match that has an adapter already, is
    the model itself, or shares the weight that init="both" would change; and what `wrap` raises. The model is untouched
    when it raises.
    """
    matches = _matcher(target)
    inside = {id(module.base) for module in model.modules() if isinstance(module, LoRALinear)}
    candidates = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear) or (type(module) is nn.Linear and id(module) not in inside)
    }
    chosen = {name: module for name, module in candidates.items() if matches(name, module)}
    if not chosen:
        raise ValueError(f"target {target!r} matches no linear layer; there are {', '.join(candidates) or 'none'}")
    for name, module in chosen.items():
        if isinstance(module, LoRALinear):
            raise ValueError(f"module {name!r} already has a LoRA adapter")
        if not name:
            raise ValueError("model must not be the layer to adapt itself: use LoRALinear.wrap")
        if options.get("init") == "both" and _shared(model, module.weight):
            raise ValueError(f"module {name!r}: init='both' must not change a weight that another module has too")
        try:
            require_wrappable(module, r, alpha, **options)
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from None
    adapted = _wrapped(chosen, r, alpha, options)
    if freeze:
        kept = {id(p) for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
    for name, module in chosen.items():
        _replace(model, name, adapted[module])
    return list(chosen)


def merge_lora(model: nn.Module, *, exact: bool = False, unload: bool = False) -> list[str]:
    """Merge every adapter of `model` that is not merged yet; the names of all of them.

    exact: as in :meth:`LoRALinear.merge`. unload: put the merged linear layers back in place of the adapters, for good.
    Raises ValueError if there are none, a weight would not be finite, or it belongs to another module too, an embedding
    or a second adapter, which would change with it; the model is untouched then.
    """
    layers = _adapters(model)
    if unload and model in layers.values():
        raise ValueError("model must not be the adapter itself to be unloaded: take its base")
    waiting = {name: layer for name, layer in layers.items() if not layer.merged}
    for name, layer in waiting.items():  # all of them before the first one changes
        if _shared(model, layer.base.weight):
            raise ValueError(f"module {name!r}: its weight must not belong to another module too: untie it first")
        try:
            layer.shifted(layer.product(layer.lora_A, layer.lora_B))
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from None
    for layer in waiting.values():
        layer.merge(exact)
    if unload:
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, LoRALinear):
                _replace(model, name, module.base)
    return list(layers)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """{"<layer>.lora_A", "<layer>.lora_B", …}: the factors of every adapter, and where they started for init="both".

    Detached, not copied, as in ``state_dict``. The scale s is the model's, not the file's: inject with the same r and
    alpha before loading. Raises ValueError for a model without adapters.
    """
    return {
        f"{name}.{factor}" if name else factor: getattr(layer, factor).detach()
        for name, layer in _adapters(model).items()
        for factor in FACTORS
        if getattr(layer, factor) is not None
    }


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, sd: dict[str, Tensor], strict: bool = True) -> tuple[list[str], list[str]]:
    """Copy factors into the adapters of `model`; returns (missing, unexpected) names, none of either with `strict`.

    For init="both" the base is moved from its own sA₀B₀ to that of the file, so that it stands for the same W₀ as
    before. Raises ValueError for a model without adapters, names that don't agree (if strict), other shapes, an adapter
    with a start without the start's entries or whose weight would not be finite, or one that is merged; the model is
    untouched then.
    """
    layers, own = _adapters(model), lora_state_dict(model)
    missing, unexpected = sorted(own.keys() - sd.keys()), sorted(sd.keys() - own.keys())
    if strict and (missing or unexpected):
        raise ValueError(f"sd must have the adapters' names: missing {missing}, unexpected {unexpected}")
    for name in own.keys() & sd.keys():
        if own[name].shape != sd[name].shape:
            raise ValueError(f"{name} must have shape {tuple(own[name].shape)}, got {tuple(sd[name].shape)}")
    new = {}
    for name, layer in layers.items():
        new[layer] = {f: sd[key] for f in FACTORS if (key := f"{name}.{f}" if name else f) in own and key in sd}
        if new[layer] and layer.merged:
            raise ValueError(f"module {name!r} is merged: unmerge it before loading")
        if new[layer] and layer.start_A is not None and len(new[layer]) < len(FACTORS):
            raise ValueError(f"module {name!r} started at A0 and B0: sd must have all of {', '.join(FACTORS)}")
    shifts = {}
    for name, layer in layers.items():
        if "start_A" in new[layer]:
            start = [new[layer][f].to(layer.start_A) for f in ("start_A", "start_B")]
            delta = layer.product(layer.start_A, layer.start_B) - layer.product(*start)
            try:
                shifts[layer] = layer.shifted(delta)
            except ValueError as error:
                raise ValueError(f"module {name!r}: {error}") from None
    for layer, factors in new.items():
        if layer in shifts:
            layer.base.weight.copy_(shifts[layer])
        for factor, value in factors.items():
            getattr(layer, factor).copy_(value)
    return missing, unexpected


def to_peft(sd: dict[str, Tensor], adapter: str = "default", prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """The same factors under the names of a peft model's ``state_dict``: "<prefix><layer>.lora_A.<adapter>.weight".

    ValueError for init="both", which peft cannot say.
    """
    if any(name.rpartition(".")[2].startswith("start_") for name in sd):
        raise ValueError("sd must not have a start (init='both'): peft's adapters begin at the weight itself")
    return {f"{prefix}{name}.{adapter}.weight": value for name, value in sd.items()}


def from_peft(sd: dict[str, Tensor], prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """The factors among the entries of a peft model's ``state_dict`` or adapter file, under our names.

    Entries of other parameters are left out. ValueError if two adapters would get the same name.
    """
    found = {}
    for name, value in sd.items():
        match = re.fullmatch(r"(.+\.lora_[AB])(\.[^.]+)?\.weight", name.removeprefix(prefix))
        if match:
            if match[1] in found:
                raise ValueError(f"sd must hold one adapter, got a second entry for {match[1]!r}: {name!r}")
            found[match[1]] = value
    return found


def loraplus_param_groups(model: nn.Module, lr: float, ratio: float, *, weight_decay: float = 0.0,
                          embedding_lr: float = 1e-6, extra_lr: float | None = None,
                          rms_floor: float = 1e-3) -> list[dict]:  # fmt: skip
    """Parameter groups for any optimizer: η_A = lr, η_B = lr·ratio   (lora-two-rates)

    Every trainable parameter is in exactly one, by its ``name``:

    - ``lora_A``           lr: the factors at the input, and all other trainables unless extra_lr is given
    - ``lora_B``           lr·ratio: the factors at the output
    - ``lora_B_no_decay``  lr·ratio, no weight decay: everything with one dimension (the paper's code and peft
      give it the same rate, but spare only biases and LayerNorms the decay)
    - ``embedding``        embedding_lr: weights of embeddings and of peft's adapters on them
    - ``extra``            extra_lr: other trainables, such as a new head

    Groups of no parameters are left out. Works for :class:`LoRALinear` and for peft's models. rms_floor: an entry of
    the factors' groups for optimizers that scale steps with RMS(θ), under which a zero factor would never move; others
    ignore it. Schedulers that multiply rates keep the ratio.
    Raises ValueError for rates, a ratio or an rms_floor that is not positive, a negative weight_decay, or a model
    without trainables.
    """
    positive = {"lr": lr, "ratio": ratio, "embedding_lr": embedding_lr, "rms_floor": rms_floor}
    for name, value in (positive | ({} if extra_lr is None else {"extra_lr": extra_lr})).items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay}")
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups = {
        "lora_A": {"lr": lr, "weight_decay": weight_decay, "rms_floor": rms_floor},
        "lora_B": {"lr": lr * ratio, "weight_decay": weight_decay, "rms_floor": rms_floor},
        "lora_B_no_decay": {"lr": lr * ratio, "weight_decay": 0.0},
        "embedding": {"lr": embedding_lr, "weight_decay": weight_decay},
        "extra": {"lr": extra_lr, "weight_decay": weight_decay},
    }
    parameters = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if id(parameter) in embeddings or any(part.startswith("lora_embedding_") for part in parts):
            group = "embedding"
        elif parameter.ndim == 1:
            group = "lora_B_no_decay"
        elif "lora_B" in parts:
            group = "lora_B"
        else:
            group = "lora_A" if "lora_A" in parts or extra_lr is None else "extra"
        parameters[group].append(parameter)
    if not any(parameters.values()):
        raise ValueError("no trainable parameters: inject LoRA first")
    return [{"name": name, "params": parameters[name]} | groups[name] for name in groups if parameters[name]]
