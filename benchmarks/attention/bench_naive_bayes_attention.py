"""Naive Bayes and the attention model side by side with their peers, in one run; prints ratios.

python -m benchmarks.attention.bench_naive_bayes_attention [--rows 1000000] [--symbols 48] [--repeats 3]
"""

import argparse
import time

import numpy as np
import torch
from sklearn.naive_bayes import CategoricalNB, MultinomialNB
from torch import nn

from benchmarks.timing import header
from kexue_utils.attention.naive_bayes_attention import NGramNaiveBayes, SkipGramAttentionLM

W = 8


def best(function, repeats):
    """(least wall time of several runs, last result)"""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def report(name, peer, ours, note=""):
    print(f"{name:<52} peer {peer:8.3f} s   ours {ours:8.3f} s   {peer / ours:6.1f}x  {note}", flush=True)


def naive_bayes(rows, symbols, repeats):
    g = np.random.default_rng(0)
    ids = torch.from_numpy(g.integers(symbols, size=rows + W))
    contexts, targets = ids.unfold(0, W, 1)[:-1].contiguous(), ids[W:]
    X, y = contexts.numpy(), targets.numpy()
    for peer_name, lag_specific in (("CategoricalNB", True), ("MultinomialNB", False)):
        double = NGramNaiveBayes(W, lag_specific=lag_specific, dtype=torch.float64).fit(ids, symbols)
        single = NGramNaiveBayes(W, lag_specific=lag_specific, dtype=torch.float32).fit(ids, symbols)
        prior = double.log_prior.exp().numpy()
        if lag_specific:
            peer, features = CategoricalNB(alpha=0.5, min_categories=symbols, class_prior=prior), X
        else:
            bags = nn.functional.one_hot(contexts, symbols).sum(1).double().numpy()
            peer, features = MultinomialNB(alpha=0.5, class_prior=prior), bags
        fit_peer, _ = best(lambda peer=peer, features=features: peer.fit(features, y), 1)
        fit_ours, _ = best(lambda double=double: double.fit(ids, symbols), repeats)
        report(f"fit {peer_name}", fit_peer, fit_ours, f"{W * rows / fit_ours / 1e6:.0f} million pairs a second")
        peer_s, theirs = best(lambda peer=peer, features=features: peer.predict_log_proba(features), repeats)
        for model in (double, single):
            ours_s, ours = best(lambda model=model: model.predict_log_proba(contexts), repeats)
            gap = np.abs(theirs - ours.numpy()).max()
            report(f"predict {peer_name}, {str(model.dtype)[6:]}", peer_s, ours_s, f"largest difference {gap:.0e}")


def attention(repeats):
    torch.manual_seed(0)
    for B, T, d, H, V in ((64, 128, 64, 1, 256), (16, 512, 256, 4, 256)):
        ids = torch.randint(V, (B, T))
        ours = SkipGramAttentionLM(V, d, n_heads=H)
        embed, unembed = nn.Embedding(V, d), nn.Linear(d, V, bias=False)
        peer = nn.MultiheadAttention(d, H, bias=False, batch_first=True)
        mask = nn.Transformer.generate_square_subsequent_mask(T)

        def peer_forward(embed=embed, unembed=unembed, peer=peer, mask=mask, ids=ids):
            x = embed(ids)
            return unembed(peer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0])

        with torch.no_grad():
            peer_forward(), ours(ids)
            peer_s, _ = best(peer_forward, repeats)
            ours_s, _ = best(lambda ours=ours, ids=ids: ours(ids), repeats)
        report(f"forward MultiheadAttention B={B} T={T} d={d} H={H}", peer_s, ours_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--symbols", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    header("cpu", ("torch", "scikit-learn"), torch.get_num_threads())
    naive_bayes(arguments.rows, arguments.symbols, arguments.repeats)
    attention(arguments.repeats)
