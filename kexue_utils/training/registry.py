"""Every recorded experiment by name; a module is imported only when its experiment is asked for."""

from importlib import import_module

_TEXT = "kexue_utils.attention.naive_bayes_attention.experiments"
_LORA = "kexue_utils.optimization.lora_plus.experiments"
_MULTIMODAL = "kexue_utils.position.rope_multimodal.experiments"
_SGD = "kexue_utils.optimization.sgd_convergence.experiments"
_FLOW = "kexue_utils.optimization.gradient_flow.experiments"
_TIGER = "kexue_utils.optimization.tiger.experiments"
_ROPE = "kexue_utils.position.rope_base_beta.experiments"
EXPERIMENTS = {
    "lora_finetune": f"{_LORA}:FINETUNE",
    "lora_tiger": f"{_LORA}:TIGER",
    "lora_widths": f"{_LORA}:WIDTHS",
    "naive_bayes_pydoc": f"{_TEXT}:PYDOC",
    "naive_bayes_sympy": f"{_TEXT}:SYMPY",
    "naive_bayes_lengths": f"{_TEXT}:LENGTHS",
    "naive_bayes_depth": f"{_TEXT}:DEPTH",
    "rope_induction": f"{_ROPE}:INDUCTION",
    "rope_text": f"{_ROPE}:TEXT",
    "multimodal_digits": f"{_MULTIMODAL}:DIGITS",
    "multimodal_shapes": f"{_MULTIMODAL}:SHAPES",
    "multimodal_text": f"{_MULTIMODAL}:TEXT",
    "sgd_regret": f"{_SGD}:REGRET",
    "schedules_text": f"{_SGD}:ADAMW",
    "schedules_text_sgd": f"{_SGD}:SGD",
    "edge_of_stability": f"{_FLOW}:EDGE",
    "langevin_bias": f"{_FLOW}:BIAS",
    "score_flow": f"{_FLOW}:SCORE",
    "tiger_betas": f"{_TIGER}:BETA",
    "tiger_decay": f"{_TIGER}:DECAY",
    "tiger_digits": f"{_TIGER}:DIGITS",
    "tiger_half": f"{_TIGER}:HALF",
    "tiger_longer": f"{_TIGER}:LONG",
    "tiger_memory": f"{_TIGER}:MEMORY",
    "tiger_ranks": f"{_TIGER}:RANKS",
    "tiger_text": f"{_TIGER}:TEXT",
    "tiger_widths": f"{_TIGER}:WIDTH",
}

# Written and tried at smoke size, not yet run on a GPU; `load` has nothing for them.
WAITING: set[str] = set()


def experiment(name):
    """The `Experiment` registered under `name`; ValueError names the choices if there is none."""
    if name not in EXPERIMENTS:
        raise ValueError(f"name = {name!r}: it must be one of {', '.join(sorted(EXPERIMENTS))}")
    module, attribute = EXPERIMENTS[name].split(":")
    return getattr(import_module(module), attribute)
