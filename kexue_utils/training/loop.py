"""One model, one loop: any loss, any optimizer, resumed where it was interrupted."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kexue_utils.training.progress import progress
from kexue_utils.training.replicas import cosine
from kexue_utils.training.transformer import autocast


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batch: Callable[[int], tuple[Tensor, ...]],
    steps: int,
    optimizer: torch.optim.Optimizer,
    *,
    warm: float = 0.05,
    clip: float | None = 1.0,
    evaluate: Callable[[], float] | None = None,
    points: int = 20,
    checkpoint=None,
    every: int = 1000,
    description: str | None = None,
) -> list[list[float]]:
    """Minimise loss(model, *batch(step)) for `steps` steps; the curve [[step, mean loss since the last point, value]].

    batch: a function of the step alone, tensors on the model's device, so that a run that goes on after an interruption
    sees what it would have seen. Learning rates of the optimizer's groups are peaks: they rise linearly over the first
    `warm` of the steps and fall as half a cosine. clip: largest norm of the gradient, None for any. evaluate: () → a
    number at each of the `points` points of the curve, with the model in eval mode. checkpoint: a
    `recorder.Checkpoint`, written every `every` steps; model, optimizer and curve go on from it.
    On a GPU the loss is compiled and its matrix products are in bfloat16; parameters and optimizer stay as they are.
    Raises FloatingPointError, with the step, where the loss is not finite at a point of the curve.
    """
    device = next(model.parameters()).device
    peaks = [group["lr"] for group in optimizer.param_groups]
    start, curve, total, count = 0, [], torch.zeros((), device=device), 0
    state = checkpoint.load(device) if checkpoint else None
    if state:
        start, curve, total, count = state["step"], state["curve"], state["total"], state["count"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def mean_loss(*tensors):
        with autocast(device):
            return loss(model, *tensors)

    if device.type == "cuda":
        torch.compiler.reset()  # graphs of earlier models count against the limit of recompilations
    compiled = torch.compile(mean_loss) if device.type == "cuda" else mean_loss
    thin = max(1, steps // points)
    for step in progress(steps, description, start):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine(step, steps, warm)
        model.train()
        value = compiled(*batch(step))
        optimizer.zero_grad()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        total += value.detach()
        count += 1
        if (step + 1) % thin == 0 or step + 1 == steps:
            mean = total.item() / count
            if not mean < float("inf"):
                raise FloatingPointError(f"the loss is {mean} after step {step + 1}")
            model.eval()
            curve.append([step + 1, mean] + ([evaluate()] if evaluate else []))
            total, count = torch.zeros((), device=device), 0
        if checkpoint and (step + 1) % every == 0 and step + 1 < steps:
            checkpoint.save({"step": step + 1, "curve": curve, "total": total, "count": count,
                             "model": model.state_dict(), "optimizer": optimizer.state_dict()})  # fmt: skip
    model.eval()
    return curve
