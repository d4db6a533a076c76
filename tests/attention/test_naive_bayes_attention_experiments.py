import json
import math

import pytest
import torch

from kexue_utils.attention.naive_bayes_attention import SkipGramAttentionLM
from kexue_utils.attention.naive_bayes_attention.experiments import depth, lengths, text
from kexue_utils.training import load
from kexue_utils.training.recorder import record
from kexue_utils.training.registry import EXPERIMENTS


@pytest.mark.parametrize("name", sorted(n for n in EXPERIMENTS if n.startswith("naive_bayes_")))
def test_the_smoke_size_of_every_experiment_runs(name, tmp_path):
    found = json.loads(record(name, smoke=True, out=tmp_path).read_text("utf-8"))
    assert found["summary"] and all(None not in unit["runs"] for unit in found["units"].values())


def random_text(n, vocab=6, seed=0):
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))


def test_every_target_sees_its_window_and_no_more():
    lm = text.WindowLM(6, 4, window=8)
    ids = random_text(2 * (lm.left + 16)).view(2, -1)
    losses = lm(ids)
    assert losses.shape == (2, 16) and (ids.shape[1] - 1) % 8 == 0
    far, near = ids.clone(), ids.clone()
    far[:, 0] = (far[:, 0] + 1) % 6
    near[:, lm.left - 8] = (near[:, lm.left - 8] + 1) % 6
    torch.testing.assert_close(lm(far)[:, 0], losses[:, 0])
    assert not torch.isclose(lm(near)[:, 0], losses[:, 0]).any()
    logits = lm.lm(ids[:, 1 : 1 + 8])[:, -1]
    expected = -logits.log_softmax(-1).gather(1, ids[:, 9:10]).squeeze(1) / math.log(2)
    torch.testing.assert_close(losses[:, 0], expected)


def test_bits_of_independent_tokens_are_their_entropy():
    counts, weights, test = random_text(60000), random_text(6000, seed=1), random_text(6000, seed=2)
    bits, w, beta = text.counted_bits(counts, weights, test, 6, window=3)
    for row in ("unigram", "bigram", "interpolated trigram", "strict naive Bayes", "naive Bayes, learned weights"):
        assert bits[row] == pytest.approx(math.log2(6), abs=0.005)
    assert len(w) == 3 and math.isfinite(beta)


def test_the_trigram_finds_a_second_order_rule():
    x = [0, 1]
    for coin in random_text(30000, vocab=10).tolist():
        x.append((x[-1] + x[-2] + (coin == 0)) % 3)
    x = torch.tensor(x)
    found = text.interpolated_trigram(x[:20000], x[20000:25000], x[25000:], 3)
    bigram = text.counted_bits(x[:20000], x[20000:25000], x[25000:], 3, window=2)[0]["bigram"]
    assert found < 0.5 and bigram > 1.5  # H(0.1) = 0.469 and log₂ 3 = 1.585


def test_common_targets_need_a_long_enough_text():
    with pytest.raises(ValueError, match="a text of 200 tokens has no targets"):
        text._targets(random_text(200), 8)


def test_reliability_of_a_calibrated_and_of_a_boastful_forecast():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(40000, 3, generator=g, dtype=torch.float64).softmax(-1)
    y = torch.multinomial(p, 1, generator=g).squeeze(1)
    fair, boastful = text.reliability(p.log(), y), text.reliability((4 * p.log()).log_softmax(-1), y)
    assert fair["ece"] < 0.01 and boastful["ece"] > 0.15
    assert fair["share"].sum() == pytest.approx(1) and (boastful["confidence"] > boastful["accuracy"])[-3:].all()


def test_live_training_beats_the_unigram():
    (counts, _, test), vocab = text.pydoc_split()
    test = test[: 136 + 2560]
    assert text.attention_bits(counts, test, vocab, "attention", d=16, steps=60) < 4.2
    assert text.attention_bits(counts, test, vocab, "attention", d=16, steps=3) == text.attention_bits(
        counts, test, vocab, "attention", d=16, steps=3
    )


def test_the_world_is_drawn_as_its_posterior_says():
    g = torch.Generator().manual_seed(0)
    emission = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64)
    ids, length, y, posterior = lengths.draw(emission, 20000, 2, 5, 5, g)
    assert length.min() == 2 and length.max() == 5
    first = posterior[:, 0]
    odds = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)[ids]
    visible = torch.arange(5) < length[:, None]
    torch.testing.assert_close(first, 1 / (1 + 1 / torch.where(visible, odds, 1).prod(1)))
    sure = first > 0.75
    assert abs((y[sure] == 0).double().mean() - first[sure].mean()) < 0.02


def test_the_sum_head_with_log_likelihood_values_is_exact_at_every_length():
    emission = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    ids, length, _, posterior = lengths.draw(emission, 50, 1, 40, 40, torch.Generator().manual_seed(1))
    kl = {}
    for pool in ("sum", "mean × t", "mean"):
        head = lengths.ClassHead(3, 2, 2, pool, bias=False)
        with torch.no_grad():
            head.q.weight.zero_()
            head.v.weight.copy_(emission.log().T)
            head.w.weight.copy_(torch.eye(2))
        kl[pool] = head(ids, length, posterior).abs().max().item()
    assert kl["sum"] < 1e-5 and kl["mean × t"] < 1e-5 and kl["mean"] > 0.05
    with pytest.raises(ValueError, match="pool = 'max'"):
        lengths.ClassHead(3, 2, 2, "max", bias=False)


def test_xor_text_obeys_its_rule_and_no_single_token_tells():
    g = torch.Generator().manual_seed(0)
    first = torch.randint(2, (4000, 5), generator=g)
    x = depth.xor_text(first, torch.zeros(4000, 20, dtype=torch.int64), [2, 5])
    assert (x[:, 19] == x[:, 17] ^ x[:, 14]).all() and (x[:, :5] == first).all()
    assert all(abs((x[:, 19] == x[:, 19 - lag]).double().mean() - 0.5) < 0.05 for lag in range(1, 9))


def test_latent_noise_vanishes_with_sigma():
    torch.manual_seed(0)
    size = {"vocab": 5, "d": 8, "residual": True, "bias": True, "lag_scores": 4, "window": 4}
    latent = depth.LatentLM(1e-9, **size)
    plain = SkipGramAttentionLM(n_layers=2, **size)
    plain.load_state_dict(latent.lm.state_dict())
    ids, noise = random_text(14, vocab=5).view(2, 7), torch.randn(3, 2, 7, 8)
    torch.testing.assert_close(latent(ids, noise), plain(ids).log_softmax(-1))
    with torch.no_grad():
        latent.log_sigma.fill_(0.0)
    found = latent(ids, noise)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 7))
    assert not torch.allclose(found, plain(ids).log_softmax(-1), atol=1e-3)


def test_the_records_say_what_the_chapter_says():
    for name in ("naive_bayes_pydoc", "naive_bayes_sympy"):
        for window in load(name)["summary"]["windows"].values():
            assert window["reproduced: strict naive Bayes > bigram > learned"]
            assert window["reproduced: residual gains more than 3 SE"]
            assert window["differences"]["gain of lag-dependent values"]["low"] > 0
    assert load("naive_bayes_lengths")["summary"]["reproduced: sum extrapolates"]
    xor = load("naive_bayes_depth")["summary"]
    assert xor["reproduced: one layer does not represent XOR"] and not xor["noise helps"]
