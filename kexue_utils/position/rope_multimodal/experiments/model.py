"""What the recorded runs share: attention on given rotary tables, and batches of documents laid out by a scheme."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_utils.position.rope_base_beta import rope_inv_freq, rotate
from kexue_utils.position.rope_multimodal.layouts import Image, layout, pad_layouts
from kexue_utils.position.rope_multimodal.rotation import axial_frequencies, frequency_partition, rope_nd_tables


class TableAttention(nn.Module):
    """Multi-head attention whose queries and keys are turned by tables that the caller has; all see all, or, with
    `causal`, all that came before.
    """

    def __init__(self, d_model: int, heads: int, *, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, T, d_model); cos, sin: from `rope_nd_tables`; mask: (B, T), True at tokens, False at padding."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = mask if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def tables(positions: Tensor, dim: int, parameters: dict) -> tuple[Tensor, Tensor]:
    """(cos, sin) in float32 for heads of `dim` features, by the base and the partition that the parameters name."""
    axes = positions.shape[-2]
    theta = rope_inv_freq(dim, base=parameters["base"])
    omega = axial_frequencies(theta, frequency_partition(dim, axes, how=parameters["partition"]), axes)
    return rope_nd_tables(positions.cpu(), omega, dtype=torch.float32)


class Documents:
    """Documents with one image each, laid out by the scheme of the parameters and padded: rows of `kind` (−1 at
    padding), `cos`, `sin` and `mask`; `above`, `left`: (n, T), the place of the patch above and of the one to the left
    of every patch, −1 where there is none; `start`: the first patch's place.
    """

    def __init__(self, documents: list[list], parameters: dict, dim: int, device: torch.device):
        laid_out = [layout(segments, parameters["scheme"]) for segments in documents]
        positions, mask = pad_layouts(laid_out)
        cos, sin = tables(positions, dim, parameters)
        rows = torch.nn.utils.rnn.pad_sequence([x.kind for x in laid_out], batch_first=True, padding_value=-1)
        above, left = torch.full((2, *mask.shape), -1)
        start = []
        for row, found in enumerate(laid_out):
            (lo, hi, w) = next(
                (*span, image.w)
                for span, image in zip(found.spans, found.segments, strict=True)
                if isinstance(image, Image)
            )
            place = torch.arange(lo, hi).view(-1, w)
            above[row, place[1:]] = place[:-1]
            left[row, place[:, 1:]] = place[:, :-1]
            start.append(lo)
        self.cos, self.sin, self.mask, self.kind = (x.to(device) for x in (cos, sin, mask, rows))
        self.above, self.left, self.start = (x.to(device) for x in (above, left, torch.tensor(start)))

    def where(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a `Transformer` of `TableAttention`s is handed with the ids of these rows."""
        return self.cos[rows], self.sin[rows], self.mask[rows]
