"""Rotary positions as modules: a table that can be rescaled at any time, and causal attention that uses it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dilution import unchecked_logn_scale
from .frequencies import attention_factor, rope_inv_freq
from .rotation import _require_layout, rope_tables, rotate


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys: q_n → f·𝓡_n q_n, k_n → f·𝓡_n k_n, with the attention factor f of the method.

    dim: number of rotated features (even; the heads may be wider), other arguments as in
    :func:`~kexue_utils.position.rope_base_beta.rope_inv_freq`. f is 1 except for YaRN and LongRoPE; ``factor``
    replaces it. There are no parameters and no buffers: the frequencies stay float64 under ``.to(dtype)``, and
    nothing enters the ``state_dict``, so a trained model can be stretched by :meth:`set_scaling` alone.
    """

    def __init__(self, dim: int, *, base: float = 10000.0, layout: str = "half", method: str = "none",
                 scale: float = 1.0, factor: float | None = None, **options: Any):  # fmt: skip
        super().__init__()
        _require_layout(layout)
        self.dim, self.base, self.layout = dim, base, layout
        self.set_scaling(method, scale, factor=factor, **options)

    def set_scaling(self, method: str, scale: float = 1.0, *, factor: float | None = None, **options: Any) -> None:
        """Change the method; costs one table. ``options``: train_len, b, alpha, beta_fast, length, factors.

        Errors as in :func:`cumulative_stretch`; TypeError for a dtype or device, as the table stays float64 and
        follows the queries; nothing changes when it raises.
        """
        if options.keys() & {"dtype", "device"}:
            raise TypeError(f"options must not name a dtype or a device, got {sorted(options)}")
        inv_freq = rope_inv_freq(self.dim, base=self.base, method=method, scale=scale, **options)
        if factor is None:
            factor = attention_factor(method, scale, options.get("train_len"))
        self.method, self.scale, self.factor, self.inv_freq = method, scale, factor, inv_freq
        self._cache = {}

    def tables(self, positions: Tensor | int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) for :func:`rotate`; for a number T, the positions 0, …, T−1, kept for the next call."""
        if not isinstance(positions, int):
            layout, factor = self.layout, self.factor
            return rope_tables(positions, self.inv_freq.to(device), layout=layout, dtype=dtype, factor=factor)
        key = (positions, dtype, device)
        if key not in self._cache:
            table = self.tables(torch.arange(positions, device=device), dtype=dtype, device=device)
            self._cache = {key: table}
        return self._cache[key]

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q, k: (..., T, features), any numbers of heads; positions as in :func:`apply_rope`, None for 0, …, T−1."""
        cos, sin = self.tables(q.shape[-2] if positions is None else positions, dtype=q.dtype, device=q.device)
        return rotate(q, cos, sin, layout=self.layout), rotate(k, cos, sin, layout=self.layout)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}, layout={self.layout!r}, method={self.method!r}, scale={self.scale:g}"


class RopeAttention(nn.Module):
    """Causal multi-head attention on rotary positions: softmax over j ≤ n of s_n (𝓡_n q_n)·(𝓡_j k_j)/√d, times v_j.

    rope: a :class:`RotaryEmbedding` (one can serve all layers). logn: None (s_n = 1), ``"train"`` or ``"posthoc"``,
    s_n of :func:`~kexue_utils.position.rope_base_beta.logn_scale` with L = ``train_len`` and n the number of visible
    keys. It multiplies q alone, so that every row of the softmax uses its own n.
    Raises ValueError for widths that don't divide, a rope wider than a head, or logn without a train_len above 1.
    """

    def __init__(self, d_model: int, n_heads: int, *, rope: RotaryEmbedding, logn: str | None = None,
                 train_len: float | None = None, bias: bool = False):  # fmt: skip
        super().__init__()
        if n_heads <= 0 or d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        if rope.dim > d_model // n_heads:
            raise ValueError(f"rope must have dim <= d_model / n_heads = {d_model // n_heads}, got {rope.dim}")
        if logn not in (None, "train", "posthoc"):
            raise ValueError(f"logn must be None, 'train' or 'posthoc', got {logn!r}")
        if logn is not None and train_len is None:
            raise ValueError(f"train_len is required for logn {logn!r}")
        if logn is not None and not train_len > 1:
            raise ValueError(f"train_len must be greater than 1, got {train_len}")
        self.n_heads, self.rope, self.logn, self.train_len = n_heads, rope, logn, train_len
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
        """x: (B, T, d_model) → (B, T, d_model).

        cache: holds the rotated keys and the values of earlier calls and is updated; pass the same {} from the first
        call on, and x continues where the last call ended.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        past = cache["k"].shape[2] if cache else 0
        T = x.shape[1]
        positions = torch.arange(past, past + T, device=x.device) if past else None
        q, k = self.rope(q, k, positions)
        if self.logn is not None:
            n = torch.arange(past + 1, past + T + 1, dtype=torch.float64, device=x.device)
            q = q * unchecked_logn_scale(n, self.train_len, self.logn).to(q.dtype)[:, None]
        if cache is not None:
            if past:
                k, v = torch.cat((cache["k"], k), 2), torch.cat((cache["v"], v), 2)
            cache["k"], cache["v"] = k, v
        visible = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=not past)
        return self.out(y.transpose(1, 2).flatten(2))
