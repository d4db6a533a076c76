"""Positions of a million patches, and rotation by three coordinates, side by side with RoPE-1D and transformers.

python -m benchmarks.position.bench_rope_multimodal [--device cuda] [--shape 1 32 2048 128] [--repeats 15]

Layouts are built on the CPU. Queries and keys of the same shape (B, H, T, d). "copy" reads and writes the same bytes
once: nothing can be faster.
"""

from math import isqrt
from types import SimpleNamespace

import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel, Qwen2VLRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.timing import header, seconds, shapes, table
from kexue_utils.position.rope_base_beta import apply_rope, rope_inv_freq, rope_tables, rotate
from kexue_utils.position.rope_multimodal import (
    SCHEMES,
    Image,
    Text,
    axial_frequencies,
    frequency_partition,
    layout,
    rope_nd,
    rope_nd_tables,
)


def measure_layouts(side, repeats):
    document = [Text(100), Image(side, side), Text(100)]
    kind = layout(document, "mrope").kind
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1)))
    model.get_vision_position_ids = lambda *a, **k: Qwen2VLModel.get_vision_position_ids(model, *a, **k)
    types, grid = (kind == 1).long()[None], torch.tensor([[1, side, side]])

    functions = {"copy": layout(document, "mrope").positions.clone}
    functions |= {scheme: lambda scheme=scheme: layout(document, scheme) for scheme in SCHEMES}
    peer = "transformers, ids of Qwen2-VL"
    functions[peer] = lambda: Qwen2VLModel.get_rope_index(model, types, types, image_grid_thw=grid)
    times = seconds(functions, "cpu", repeats)
    pairs = [("copy", None), (peer, None), *((scheme, peer if scheme == "mrope" else None) for scheme in SCHEMES)]
    table(f"layout of {side} x {side} patches", times, "copy", pairs)


def measure_rotation(shape, dtype, device, repeats):
    B, H, T, d = shape
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    side = isqrt(T // 2)
    document = [Text(T - side * side - 2), Image(side, side)]
    positions = layout(document, "mrope", start=0).positions.to(device)
    ids, theta = torch.arange(T, device=device), rope_inv_freq(d, device=device)
    third = d // 2 // 3
    sections = [d // 2 - 2 * third, third, third]
    partition = frequency_partition(d, 3, how="chunked", sections=sections)
    frequencies = axial_frequencies(theta, partition.to(device), 3)
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    config = Qwen2VLTextConfig(hidden_size=d * H, num_attention_heads=H, rope_parameters=parameters)
    qwen, theirs = Qwen2VLRotaryEmbedding(config).to(device), positions[:, None].long()
    tables = rope_nd_tables(positions, frequencies, dtype=dtype)
    peer_tables = qwen(q, theirs)
    for x, y in zip((q, k), apply_rotary_pos_emb(q, k, *peer_tables), strict=True):
        torch.testing.assert_close(rotate(x, *tables), y, rtol=2e-2, atol=4e-2)  # the same work; bf16: an ulp or two

    functions = {
        "copy": lambda: (q.clone(), k.clone()),
        "RoPE-1D, tables": lambda: rope_tables(ids, theta, dtype=dtype),
        "transformers, tables": lambda: qwen(q, theirs),
        "rope_nd_tables": lambda: rope_nd_tables(positions, frequencies, dtype=dtype),
        "transformers, tables given": lambda: apply_rotary_pos_emb(q, k, *peer_tables),
        "rotate, tables given": lambda: (rotate(q, *tables), rotate(k, *tables)),
        "apply_rope (1D)": lambda: (apply_rope(q, ids, theta), apply_rope(k, ids, theta)),
        "transformers with its tables": lambda: apply_rotary_pos_emb(q, k, *qwen(q, theirs)),
        "rope_nd": lambda: (rope_nd(q, positions, frequencies), rope_nd(k, positions, frequencies)),
    }
    pairs = [
        ("copy", None),
        ("RoPE-1D, tables", None),
        ("transformers, tables", None),
        ("rope_nd_tables", "RoPE-1D, tables"),
        ("transformers, tables given", None),
        ("rotate, tables given", "transformers, tables given"),
        ("transformers with its tables", None),
        ("apply_rope (1D)", None),
        ("rope_nd", "transformers with its tables"),
    ]
    if device == "cuda":
        for name in ("rotate, tables given", "rope_nd"):
            functions[f"{name}, compiled"] = torch.compile(functions[name], fullgraph=True, dynamic=False)
            pairs.append((f"{name}, compiled", "transformers with its tables"))
    with torch.no_grad():
        times = seconds(functions, device, repeats)
    table(f"B={B} H={H} T={T} d={d}, {str(dtype)[6:]}", times, "copy", pairs)
    print(f"  rope_nd takes {times['rope_nd'] / times['apply_rope (1D)']:.2f} times as long as apply_rope")


if __name__ == "__main__":
    arguments = shapes(__doc__, cuda=[(8, 32, 4096, 128)], cpu=[(1, 8, 2048, 64), (1, 32, 2048, 128)])
    header(arguments.device, ("torch", "transformers"), threads=1)
    print("ratio: time of the peer over ours")
    measure_layouts(1000, arguments.repeats)
    for shape in arguments.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            measure_rotation(shape, dtype, arguments.device, arguments.repeats)
