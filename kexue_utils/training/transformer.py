"""A small pre-norm transformer whose attention, and with it every notion of position, is the caller's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, d_model, attention):
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(d_model, bias=False) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model, bias=False), nn.GELU(), nn.Linear(4 * d_model, d_model, bias=False)
        )

    def forward(self, x, *where):
        x = x + self.attention(self.norms[0](x), *where)
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """x ← x + Attention(norm x), x ← x + MLP(norm x), `layers` times; logits = W norm(x), W apart from the embedding.

    vocab: V; classes: outputs per place, V by default; attention: () → a module (B, T, d_model) → (B, T, d_model),
    called once a layer, which knows about positions and about who may see whom. Weights of linear maps and embeddings
    are drawn from N(0, 0.02²), those that write into x (the last linear map of attention and of MLP) from
    N(0, 0.02²/(2·layers)).
    """

    def __init__(
        self, vocab: int, d_model: int, layers: int, attention: Callable[[], nn.Module], classes: int | None = None
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(_Block(d_model, attention()) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, classes or vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            for part in (block.attention, block.mlp):
                *_, last = (m for m in part.modules() if isinstance(m, nn.Linear))
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, ids: Tensor, *where: Tensor) -> Tensor:
        """ids: (B, T) int64 → logits (B, T, classes); `where` is handed to every layer's attention."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, *where)
        return self.head(self.norm(x))


def decayed(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: matrices and embeddings decay, gains and biases don't."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products on a GPU, full precision on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
