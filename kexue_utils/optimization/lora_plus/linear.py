"""A frozen linear map with a low-rank adapter: LoRA as a module.

Sources: E. Hu et al., arXiv:2106.09685; https://kexue.fm/archives/9590; rank-stabilised scale: arXiv:2312.03732
"""

import math
import warnings
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITS = ("A", "B", "both", "peft")


def require_wrappable(base: nn.Module, r: int, alpha: float | None = None, *, rslora: bool = False, init: str = "A",
                      dropout: float = 0.0, dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """Raise what :meth:`LoRALinear.wrap` raises for these arguments, and do nothing else."""
    _require_linear(base)
    least = min(base.in_features, base.out_features)
    if not (isinstance(r, Integral) and 1 <= r <= least):
        raise ValueError(f"r must be an integer between 1 and min(n, m) = {least}, got {r!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if alpha is not None and not (math.isfinite(alpha) and alpha):
        raise ValueError(f"alpha must be finite and not zero, got {alpha}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point one, got {dtype}")
    _require_dropout(dropout)


def _require_linear(base):
    if type(base) is not nn.Linear:  # the forward of a subclass may be something else
        raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")


def _require_dropout(dropout):
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


class LoRALinear(nn.Module):
    """y = base(x) + s·(x lora_Aᵀ) lora_Bᵀ: the book's Y = XW₀ + s(XA)B, stored transposed as torch stores weights
    (lora-forward)

    base: the frozen nn.Linear(n, m); lora_A = Aᵀ: (r, n) and lora_B = Bᵀ: (m, r), the trained factors, in a dtype of
    their own: they are cast to that of x where they are used. scaling: s. start: None, or (A₀ᵀ, B₀ᵀ), whose product
    s·A₀B₀ has already been taken from base.weight. dropout: share of x's entries that the adapter doesn't see.
    :meth:`wrap` draws the factors. base.weight stops requiring gradients, base.bias stays as it is.
    A ``state_dict`` doesn't know whether it was merged: unmerge before you save one.
    Raises TypeError for a base that is not an nn.Linear, ValueError for factors that don't fit it, a scaling that is
    not finite or a dropout outside [0, 1).
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0, *,
                 start: tuple[Tensor, Tensor] | None = None, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        _require_linear(base)
        _require_dropout(dropout)
        for A, B in [(lora_A, lora_B)] + ([start] if start else []):
            shapes = tuple(A.shape), tuple(B.shape)
            if not len(A) or shapes != ((len(A), base.in_features), (base.out_features, len(A))):
                expected = f"(r, {base.in_features}) and ({base.out_features}, r) with r > 0"
                raise ValueError(f"lora_A and lora_B must be {expected}, got {shapes[0]} and {shapes[1]}")
        if not math.isfinite(scaling):
            raise ValueError(f"scaling must be finite, got {scaling}")
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        start_A, start_B = start or (None, None)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)
        self.scaling, self.dropout, self.merged = scaling, dropout, False
        self._kept = None
        base.weight.requires_grad_(False)

    @classmethod
    def wrap(cls, base: nn.Linear, r: int, alpha: float | None = None, *, rslora: bool = False, init: str = "A",
             dropout: float = 0.0, dtype: torch.dtype | None = None) -> "LoRALinear":  # fmt: skip
        """An adapter of rank r on `base` that changes nothing yet, drawn from torch's global generator   (lora-start)

        s = α/r, or α/√r with rslora; alpha: α, by default what makes s = 1.
        init: ``"A"`` A ~ N(0, 1/n), B = 0; ``"B"`` A = 0, B ~ N(0, 1/r); ``"peft"`` A uniform on ±1/√n as in peft and
        B = 0; ``"both"`` A and B as above, W = W₀ − sA₀B₀ + sAB: sA₀B₀ is taken from base.weight, A₀ and B₀ are kept as
        buffers.
        dtype: of the factors, by default the base's, float32 where that has 16 bits.
        Raises ValueError for another init, an r that is not between 1 and min(n, m), α = 0 or not finite, a dropout
        outside [0, 1), a start ("both") that the weight's dtype can't hold; TypeError for a base that is not an
        nn.Linear. The base is untouched when it raises.
        """
        require_wrappable(base, r, alpha, rslora=rslora, init=init, dropout=dropout, dtype=dtype)
        n, m, weight = base.in_features, base.out_features, base.weight
        scaling = 1.0 if alpha is None else alpha / (math.sqrt(r) if rslora else r)
        if dtype is None:
            dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        lora_A, lora_B = (torch.zeros(shape, dtype=dtype, device=weight.device) for shape in ((r, n), (m, r)))
        if init == "peft":
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        elif init != "B":
            nn.init.normal_(lora_A, std=n**-0.5)
        if init in ("B", "both"):
            nn.init.normal_(lora_B, std=r**-0.5)
        start = (lora_A.clone(), lora_B.clone()) if init == "both" else None
        trained = weight.requires_grad
        layer = cls(base, lora_A, lora_B, scaling, start=start, dropout=dropout)
        if start:
            try:
                layer.shift_base(-layer.product(*start))
            except ValueError:
                weight.requires_grad_(trained)
                raise
        return layer

    @property
    def r(self) -> int:
        return len(self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, n) → (…, m), in the dtype that the base returns; a merged adapter is part of the base."""
        y = self.base(x)
        if self.merged:
            return y
        seen = F.dropout(x, self.dropout, self.training) if self.dropout else x
        z = self.scaling * F.linear(seen, self.lora_A.to(x.dtype))
        return y + F.linear(z, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def product(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """s·(AB)ᵀ, (m, n), in float32 or better, also under autocast."""
        dtype = torch.promote_types(torch.promote_types(self.base.weight.dtype, lora_A.dtype), torch.float32)
        with torch.autocast(lora_A.device.type, enabled=False):
            return self.scaling * (lora_B.to(dtype) @ lora_A.to(dtype))

    def delta_weight(self) -> Tensor:
        """(m, n): what the adapter adds to the weight that the base had before, s(AB − A₀B₀)ᵀ   (lora-start)

        In float32 or better, merged or not; no gradient.
        """
        delta = self.product(self.lora_A, self.lora_B)
        return delta if self.start_A is None else delta - self.product(self.start_A, self.start_B)

    @torch.no_grad()
    def shifted(self, delta: Tensor) -> Tensor:
        """base.weight + delta, rounded once to the weight's dtype. Raises ValueError if that is not finite."""
        weight = self.base.weight
        shifted = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if not shifted.isfinite().all():
            raise ValueError(f"the weight with its adapter must be finite in {weight.dtype}, and it is not")
        return shifted

    @torch.no_grad()
    def shift_base(self, delta: Tensor) -> None:
        """Add `delta` to base.weight in place, as :meth:`shifted` does."""
        self.base.weight.copy_(self.shifted(delta))

    @torch.no_grad()
    def merge(self, exact: bool = False) -> None:
        """Put s(AB)ᵀ into base.weight, formed in float32 or better and rounded once; until :meth:`unmerge`.

        exact: keep a copy of the weight, so that unmerging gives back every bit of it; without one it is right to two
        roundings of the larger of the weight before and after. A second merge warns and does nothing.
        Raises ValueError, the weight untouched, if the sum is not finite. Weights tied to others change there too.
        """
        if self.merged:
            warnings.warn("the adapter is merged already: nothing done", stacklevel=2)
            return
        kept = self.base.weight.clone() if exact else None
        self.shift_base(self.product(self.lora_A, self.lora_B))
        self.merged, self._kept = True, kept

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`; warns and does nothing if there is nothing to undo."""
        if not self.merged:
            warnings.warn("the adapter is not merged: nothing done", stacklevel=2)
            return
        if self._kept is None:
            self.shift_base(-self.product(self.lora_A, self.lora_B))
        else:
            self.base.weight.copy_(self._kept)
        self.merged, self._kept = False, None

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}, merged={self.merged}"
