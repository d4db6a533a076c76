"""Attention language models whose experts are skip-gram models.

Source: https://kexue.fm/archives/9648
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def additive_scores(q: Tensor, k: Tensor, u: Tensor) -> Tensor:
    """Additive attention scores u·tanh(q_i + k_j) (nb-additive), for queries and keys already projected.

    q: (..., T, d), k: (..., S, d), u: (d,) or broadcastable to (..., T, S, d); returns (..., T, S). Any
    floating dtype. Needs T·S·d intermediate values where the dot product q_i·k_j needs T·S.
    Source: Bahdanau et al. 1409.0473.
    """
    return ((q.unsqueeze(-2) + k.unsqueeze(-3)).tanh() * u).sum(-1)


def _lags(T: int, device: torch.device) -> Tensor:
    """t − j for the query i = t−1 in the rows and the key j in the columns; at most 0 for the future."""
    position = torch.arange(T, device=device)
    return position[:, None] - position + 1


class SkipGramExperts(NamedTuple):
    """The conditional distributions log p(x_t|x_j) that a one-layer model pools.

    heads: (H, L, V, V), at [h, ℓ−1, x_j, x_t], lags beyond L share the last table. residual: (V, V) or None.
    """

    heads: Tensor
    residual: Tensor | None


class AttentionPool(nn.Module):
    """One read-out Σ_j a_{t,j} v(x_j) [+ u(x_{t−1})], heads concatenated (nb-readout, nb-attention, nb-residual).

    On token ids (``vocab`` given) the maps q, k, v, u are tables; on vectors z they are linear, and the
    residual is z itself. The query i = t−1 attends to the keys j ≤ i, itself included (nb-shift).
    """

    def __init__(
        self,
        d: int,
        n_heads: int,
        *,
        vocab: int | None,
        residual: bool,
        lag_values: int,
        lag_scores: int,
        window: int | None,
        qk: str,
    ) -> None:
        super().__init__()

        def feature(size: int) -> nn.Module:
            return nn.Linear(d, size, bias=False) if vocab is None else nn.Embedding(vocab, size)

        self.n_heads, self.n_tables, self.window = n_heads, max(lag_values, 1), window
        self.fused = qk == "dot" and self.n_tables == 1
        self.q, self.k, self.v = feature(d), feature(d), feature(d * self.n_tables)
        self.u = (nn.Identity() if vocab is None else feature(d)) if residual else None
        self.merge = nn.Linear(d, d, bias=False) if n_heads > 1 else nn.Identity()
        self.lag_bias = nn.Parameter(torch.zeros(n_heads, lag_scores)) if lag_scores else None
        self.additive = nn.Parameter(torch.empty(n_heads, 1, 1, d // n_heads)) if qk == "additive" else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T) ids or (B, T, d) vectors; returns (B, T, d)."""
        B, T, *_ = x.shape
        v = self.v(x).view(B, T, self.n_tables, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (L, B, H, T, d/H)
        far = v[-1]
        if self.fused:
            q, k = self._heads(self.q(x)), self._heads(self.k(x))
            plain = self.lag_bias is None and self.window is None
            mask = None if plain else self._mask(T, q)
            read = F.scaled_dot_product_attention(q, k, far, attn_mask=mask, is_causal=plain, scale=1.0)
        else:
            a = self.weights(x)
            read = a @ far
            for back in range(min(self.n_tables, T)):  # t − 1 − j
                near = a.diagonal(-back, 2, 3).unsqueeze(3) * (v[back] - far)[..., : T - back, :]
                read = read + F.pad(near, (0, 0, back, 0))
        z = self.merge(read.transpose(1, 2).flatten(2))
        return z if self.u is None else z + self.u(x)

    def weights(self, x: Tensor) -> Tensor:
        """a_{t,j} = e^{s(x_{t−1}, x_j, lag)} / Σ_{j<t} e^s, in the rows i = t−1: (B, H, T, T)."""
        q, k = self._heads(self.q(x)), self._heads(self.k(x))
        scores = q @ k.mT if self.additive is None else additive_scores(q, k, self.additive)
        return (scores + self._mask(x.shape[1], scores)).softmax(3)

    def _heads(self, features: Tensor) -> Tensor:
        return features.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def _mask(self, T: int, like: Tensor) -> Tensor:
        lag = _lags(T, like.device)
        visible = lag >= 1
        if self.window is not None:
            visible = visible & (lag <= self.window)
        if self.lag_bias is None:
            bias = like.new_zeros(T, T)
        else:
            bias = self.lag_bias[:, lag.clamp(1, self.lag_bias.shape[1]) - 1].to(like.dtype)
        return bias.masked_fill(~visible, -math.inf)


class SkipGramAttentionLM(nn.Module):
    """Attention language model = weighted naive Bayes whose experts are skip-gram models.

        p(x_t|x_j) = e^{v(x_j)·w(x_t)} / Z(x_j)                                                  (nb-skipgram)
        a_{t,j} = e^{q(x_{t−1})·k(x_j)} / Z_t                                                    (nb-attention)
        log p(x_t|x_{<t}) = (Σ_j a_{t,j} v(x_j) [+ u(x_{t−1})])·w(x_t) [+ b(x_t)] + const          (nb-residual)

    The scores carry no 1/√d: it is a rescaling of q. Further layers take the read-out vectors in place of
    the tokens (nb-latent). There are no positions but those that ``lag_scores`` and ``lag_values`` bring in.

    vocab: V. d: of the read-out. n_layers, n_heads (divides d). residual: adds u(x_{t−1}). bias: adds b(x_t).
    lag_values: L value tables, for the lags t−j = 1..L, the last one for all beyond; 0 or 1 is one table.
    lag_scores: as many learned biases of the score by lag, the last one for all beyond; 0 is none.
    window: attend to the last ``window`` tokens only; None is all. qk: "dot", or "additive" with the score
    u·tanh(q + k) (nb-additive).
    Raises ValueError for an argument out of range.
    Source: https://kexue.fm/archives/9648
    """

    def __init__(
        self,
        vocab: int,
        d: int,
        n_layers: int = 1,
        n_heads: int = 1,
        residual: bool = False,
        bias: bool = False,
        lag_values: int = 0,
        qk: str = "dot",
        *,
        lag_scores: int = 0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("vocab", vocab, 1),
            ("d", d, 1),
            ("n_layers", n_layers, 1),
            ("n_heads", n_heads, 1),
            ("lag_values", lag_values, 0),
            ("lag_scores", lag_scores, 0),
            ("window", 1 if window is None else window, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if d % n_heads:
            raise ValueError(f"n_heads must divide d={d}, got {n_heads}")
        if qk not in ("dot", "additive"):
            raise ValueError(f"qk must be 'dot' or 'additive', got {qk!r}")
        self.layers = nn.ModuleList(
            AttentionPool(
                d,
                n_heads,
                vocab=vocab if layer == 0 else None,
                residual=residual,
                lag_values=lag_values,
                lag_scores=lag_scores,
                window=window,
                qk=qk,
            )
            for layer in range(n_layers)
        )
        self.w = nn.Linear(d, vocab, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices ~ N(0, 1/d), so that scores and logits start near 0; biases 0."""
        for name, p in self.named_parameters():
            if name.endswith(("lag_bias", "w.bias")):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=self.w.in_features**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token at every position: row i predicts x_{i+1} from the tokens up to i (nb-shift).

        ids: (B, T) integers in [0, V), T >= 1; returns (B, T, V). Raises ValueError for another shape,
        TypeError for ids that are not integers. The range of their values is not read.
        """
        self._require_ids(ids)
        z = ids
        for layer in self.layers:
            z = layer(z)
        return self.w(z)

    def expert_log_probs(self) -> SkipGramExperts:
        """The experts' tables log p(x_t|x_j) = v(x_j)·w(x_t) − log Z(x_j), by head and lag (nb-skipgram, nb-heads).

        The value table of a head is its own block of v times its block of the merging matrix.
        Raises NotImplementedError for n_layers > 1, where the experts depend on the context.
        """
        layer = self._only_layer()
        v = layer.v.weight.unflatten(1, (layer.n_tables, layer.n_heads, -1)).permute(2, 1, 0, 3)  # (H, L, V, d/H)
        if isinstance(layer.merge, nn.Linear):
            v = v @ layer.merge.weight.unflatten(1, (layer.n_heads, -1)).permute(1, 2, 0).unsqueeze(1)
        residual = None
        if layer.u is not None:
            residual = (layer.u.weight @ self.w.weight.T).log_softmax(1)
        return SkipGramExperts((v @ self.w.weight.T).log_softmax(3), residual)

    def as_naive_bayes(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The model's prediction taken apart: the experts, and the weights of their pool (nb-absorb).

        ids: (B, T). Returns weights (B, T, E), log_cond (B, T, E, V) and the output bias (V,) or None, where
        the E experts are heads × positions j, and the residual's as the last one, of weight 1; positions that
        are not visible have weight 0. ``combine_log_probs(log_cond, weights=weights, normalize_weights=False)``
        plus the bias equals the logits up to a constant per position. Holds B·T·E·V numbers: for short texts.
        Raises NotImplementedError for n_layers > 1; otherwise as ``forward``.
        """
        layer = self._only_layer()
        self._require_ids(ids)
        experts = self.expert_log_probs()
        weights = layer.weights(ids).transpose(1, 2).flatten(2)
        lag = _lags(ids.shape[1], ids.device).clamp(1, layer.n_tables)
        log_cond = experts.heads[:, lag - 1, ids[:, None, :]].permute(1, 2, 0, 3, 4).flatten(2, 3)
        if experts.residual is not None:
            weights = torch.cat([weights, weights.new_ones(*ids.shape, 1)], 2)
            log_cond = torch.cat([log_cond, experts.residual[ids].unsqueeze(2)], 2)
        return weights, log_cond, self.w.bias

    def _only_layer(self) -> AttentionPool:
        if len(self.layers) > 1:
            raise NotImplementedError(
                f"naive Bayes experts exist for n_layers=1 only, got n_layers={len(self.layers)}: "
                "a second layer pools vectors that depend on the context, not tokens"
            )
        return self.layers[0]

    def _require_ids(self, ids: Tensor) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be a tensor of integers, got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must have shape (B, T) with T >= 1, got {tuple(ids.shape)}")
