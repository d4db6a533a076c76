"""LoRA, and different learning rates for its two factors.

Source: 《配置不同的学习率，LoRA还能再涨一点？》, Jianlin Su, https://kexue.fm/archives/10001
"""

from .contribution import (
    Contribution,
    ContributionMeter,
    coherence,
    coherence_ratio,
    coherent_ratio,
    contribution,
    feature_changes,
    first_order_change,
    incoherent_ratio,
    post_ratio,
    sgd_ratio,
    sign_contributions,
    sign_ratio,
    watch_contributions,
)
from .factors import (
    additive_update,
    factored_flops,
    lecun_factors,
    lora_forward,
    lora_gradients,
    lora_increment,
    materialised_flops,
    projected_gradient,
    rescaled,
)
from .inject import (
    from_peft,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    loraplus_param_groups,
    merge_lora,
    to_peft,
)
from .linear import LoRALinear
from .sweep import SlopeInterval, SweepResult, soft_argmin, width_sweep
from .toy import Observation, Toy, draw_toy, train_cells, train_grid

__all__ = [
    "Contribution",
    "ContributionMeter",
    "LoRALinear",
    "Observation",
    "SlopeInterval",
    "SweepResult",
    "Toy",
    "additive_update",
    "coherence",
    "coherence_ratio",
    "coherent_ratio",
    "contribution",
    "draw_toy",
    "factored_flops",
    "feature_changes",
    "first_order_change",
    "from_peft",
    "incoherent_ratio",
    "inject_lora",
    "lecun_factors",
    "load_lora_state_dict",
    "lora_forward",
    "lora_gradients",
    "lora_increment",
    "lora_state_dict",
    "loraplus_param_groups",
    "materialised_flops",
    "merge_lora",
    "post_ratio",
    "projected_gradient",
    "rescaled",
    "sgd_ratio",
    "sign_contributions",
    "sign_ratio",
    "soft_argmin",
    "to_peft",
    "train_cells",
    "train_grid",
    "watch_contributions",
    "width_sweep",
]
