"""A byte-level GPT, many copies side by side: every parameter has one more dimension in front, the copy's number."""

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB = 256


def shapes(p: dict) -> dict[str, tuple[int, ...]]:
    """{name: shape} of one copy's parameters: embeddings, matrices (n, m) for x ↦ xW, gains of norms."""
    d = p["d_model"]
    block = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d), "norm 1": (d,), "norm 2": (d,)}
    found = {"embed": (VOCAB, d), "places": (p["L"], d), "head": (d, VOCAB), "norm": (d,)}
    return found | {f"{name} {layer}": shape for layer in range(p["layers"]) for name, shape in block.items()}


def kind(name: str) -> str:
    """What a rule may treat by itself: "gain", "embedding" or "matrix"."""
    return "gain" if name.startswith("norm") else "embedding" if name in ("embed", "places") else "matrix"


def start(p: dict, seed: int) -> dict[str, Tensor]:
    """Parameters of one copy: gains 1, the rest normal; what writes into the stream is smaller by √(2·layers).

    p["init"]: standard deviation of matrices, None for 1/√fan-in; of embeddings it is 0.02.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(p).items():
        if kind(name) == "gain":
            found[name] = torch.ones(shape)
            continue
        std = 0.02 if kind(name) == "embedding" else p["init"] or shape[0] ** -0.5
        if name.startswith(("out", "down")):
            std /= (2 * p["layers"]) ** 0.5
        found[name] = std * torch.randn(shape, generator=generator)
    return found


def stacked(p: dict, seeds: list, copies: int, device, dtype=torch.float32) -> dict[str, Tensor]:
    """Parameters of copies·len(seeds) models, number c·len(seeds) + s with the start of seed s."""
    found = [start(p, seed) for seed in seeds] * copies
    return {name: torch.stack([one[name] for one in found]).to(device, dtype).requires_grad_() for name in shapes(p)}


def losses(parameters: dict[str, Tensor], ids: Tensor, p: dict, products: torch.dtype) -> Tensor:
    """Nats per byte of P models: ids (P, B, L + 1) → (P, B, L).

    Matrix products are in `products`, the stream is in the parameters' own dtype, softmax and loss in float32.
    """
    (P, B, L), d = ids[..., 1:].shape, p["d_model"]

    def product(x, name):
        return torch.bmm(x, parameters[name].to(products))

    def normed(x, name):
        return F.layer_norm(x, (d,)).to(products) * parameters[name][:, None].to(products)

    def added(x, y):
        return (x + y).to(x.dtype)

    rows = ids[..., :-1] + VOCAB * torch.arange(P, device=ids.device)[:, None, None]
    x = (F.embedding(rows, parameters["embed"].flatten(0, 1)) + parameters["places"][:, None]).flatten(1, 2)
    for layer in range(p["layers"]):
        qkv = product(normed(x, f"norm 1 {layer}"), f"qkv {layer}")
        q, k, v = qkv.view(P * B, L, 3, p["heads"], -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(P, B * L, d)
        x = added(x, product(mixed, f"out {layer}"))
        x = added(x, product(F.gelu(product(normed(x, f"norm 2 {layer}"), f"up {layer}")), f"down {layer}"))
    logits = product(normed(x, "norm"), "head").float().flatten(0, 1)
    return F.cross_entropy(logits, ids[..., 1:].flatten(), reduction="none").view(P, B, L)
