"""Rotary positions side by side with transformers and rotary-embedding-torch, in one run; prints ratios.

python -m benchmarks.position.bench_rope [--device cuda] [--shape 1 32 2048 128] [--repeats 15]

Queries and keys of the same shape (B, H, T, d). "copy" reads and writes the same bytes once: nothing can be faster.
"""

import rotary_embedding_torch
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks.timing import header, seconds, shapes, table
from kexue_utils.position.rope_base_beta import RotaryEmbedding, apply_rope, rope_inv_freq, rotate


def measure(shape, dtype, device, repeats):
    B, H, T, d = shape
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    positions, theta = torch.arange(T, device=device), rope_inv_freq(d, device=device)
    config = LlamaConfig(hidden_size=d * H, num_attention_heads=H, max_position_embeddings=T)
    llama, lucid = LlamaRotaryEmbedding(config).to(device), rotary_embedding_torch.RotaryEmbedding(d).to(device)
    half, interleaved = RotaryEmbedding(d), RotaryEmbedding(d, layout="interleaved")
    tables, peer_tables = half.tables(T, dtype=dtype, device=q.device), llama(q, positions[None])

    functions = {
        "copy": lambda: (q.clone(), k.clone()),
        "transformers, tables given": lambda: apply_rotary_pos_emb(q, k, *peer_tables),
        "rotate, tables given": lambda: (rotate(q, *tables), rotate(k, *tables)),
        "transformers with its tables": lambda: apply_rotary_pos_emb(q, k, *llama(q, positions[None])),
        "apply_rope with its tables": lambda: (apply_rope(q, positions, theta), apply_rope(k, positions, theta)),
        "RotaryEmbedding, half": lambda: half(q, k),
        "rotary-embedding-torch": lambda: (lucid.rotate_queries_or_keys(q), lucid.rotate_queries_or_keys(k)),
        "RotaryEmbedding, interleaved": lambda: interleaved(q, k),
    }
    pairs = [
        ("copy", None),
        ("transformers, tables given", None),
        ("rotate, tables given", "transformers, tables given"),
        ("transformers with its tables", None),
        ("apply_rope with its tables", "transformers with its tables"),
        ("RotaryEmbedding, half", "transformers with its tables"),
        ("rotary-embedding-torch", None),
        ("RotaryEmbedding, interleaved", "rotary-embedding-torch"),
    ]
    if device == "cuda":
        for name in ("transformers, tables given", "rotate, tables given", "RotaryEmbedding, interleaved"):
            functions[f"{name}, compiled"] = torch.compile(functions[name], fullgraph=True, dynamic=False)
            pairs.append((f"{name}, compiled", "transformers, tables given"))
    with torch.no_grad():
        times = seconds(functions, device, repeats)
    table(f"B={B} H={H} T={T} d={d}, {str(dtype)[6:]}", times, "copy", pairs)


if __name__ == "__main__":
    arguments = shapes(__doc__, cuda=[(8, 32, 4096, 128)], cpu=[(1, 8, 2048, 64), (1, 32, 2048, 128)])
    header(arguments.device, ("torch", "transformers", "rotary-embedding-torch"), threads=1)
    print("ratio: time of the peer over ours")
    for shape in arguments.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            measure(shape, dtype, arguments.device, arguments.repeats)
