"""Frequency tables: against transformers, against each other, and the numbers of the posts."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kexue_utils.position.rope_base_beta import (
    METHODS,
    attention_factor,
    cumulative_stretch,
    dynamic_scale,
    rope_inv_freq,
    yarn_attention_factor,
)
from tests.tolerances import assert_close


def options(method, dim, L, k):
    """What a method needs beside dim and scale."""
    special = {"dynamic": {"length": k * L}, "longrope": {"factors": [k ** (j / dim) for j in range(dim // 2)]}}
    return {"train_len": L, **special.get(method, {})}


def transformers_inv_freq(kind, dim, *, base=10000.0, length=None, L=2048, **parameters):
    """(frequencies, attention factor) of the released code. "default" has no entry of its own in the table."""
    rope = {"rope_theta": base, "rope_type": kind, "original_max_position_embeddings": L, **parameters}
    if kind in ("default", "linear", "dynamic"):
        del rope["original_max_position_embeddings"]
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=L, rope_parameters=rope)
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def agree(ours, theirs):
    """Their tables are float32 with a float32 power: relative error below 1e-6."""
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("L", [256, 2048, 4096])
@pytest.mark.parametrize("k", [1, 2, 8, 16])
def test_every_method_of_transformers(dim, L, k):
    kwargs = {"scale": float(k), "train_len": L}
    agree(rope_inv_freq(dim), transformers_inv_freq("default", dim, L=L)[0])
    agree(rope_inv_freq(dim, method="pi", **kwargs), transformers_inv_freq("linear", dim, L=L, factor=float(k))[0])

    theirs, factor = transformers_inv_freq("yarn", dim, L=L, factor=float(k))
    agree(rope_inv_freq(dim, method="yarn", **kwargs), theirs)
    assert attention_factor("yarn", k) == pytest.approx(factor, rel=1e-15)

    ntk = transformers_inv_freq("dynamic", dim, L=L, length=k * L, factor=1.0)[0]
    agree(rope_inv_freq(dim, method="ntk", **kwargs), ntk)
    for n in (L // 2, L, 3 * L + 7, k * L):
        theirs = transformers_inv_freq("dynamic", dim, L=L, length=n, factor=float(k))[0]
        agree(rope_inv_freq(dim, method="dynamic", length=n, **kwargs), theirs)
        agree(rope_inv_freq(dim, method="ntk", scale=dynamic_scale(n, L, k)), theirs)

    parameters = {"factor": float(k), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    agree(rope_inv_freq(dim, method="llama3", **kwargs), transformers_inv_freq("llama3", dim, L=L, **parameters)[0])

    long, short = [1 + k * j / dim for j in range(dim // 2)], [1.0] * (dim // 2)
    parameters = {"factor": float(k), "long_factor": long, "short_factor": short}
    for factors, n in ((long, L + 1), (short, L)):
        theirs, factor = transformers_inv_freq("longrope", dim, L=L, length=n, **parameters)
        agree(rope_inv_freq(dim, method="longrope", factors=factors, **kwargs), theirs)
        assert attention_factor("longrope", k, L) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize(
    ("dim", "L", "alpha", "beta"), [(64, 64, 1, 32), (64, 512, 2, 8), (4, 300, 1, 32), (128, 10**6, 1, 32)]
)
def test_yarn_at_the_ends_of_its_ramp(dim, L, alpha, beta):
    theirs = transformers_inv_freq("yarn", dim, L=L, factor=8.0, beta_fast=float(beta), beta_slow=float(alpha))[0]
    agree(rope_inv_freq(dim, method="yarn", scale=8.0, train_len=L, alpha=alpha, beta_fast=beta), theirs)


def test_yarn_where_the_ramp_leaves_the_table():
    theirs = transformers_inv_freq("yarn", 8, base=10.0, L=10**4, factor=8.0)[0]
    agree(rope_inv_freq(8, base=10.0, method="yarn", scale=8.0, train_len=10**4), theirs)


def test_released_yarn_stretches_nothing_where_no_pair_makes_a_turn_and_ours_does():
    assert_close(transformers_inv_freq("yarn", 64, L=2, factor=8.0)[0], rope_inv_freq(64, dtype=torch.float32))
    assert (cumulative_stretch(64, "yarn", 8.0, train_len=2)[1:] == 8).all()


def test_yarn_with_an_empty_ramp_stretches_all_but_the_first_pair():
    expected = torch.tensor([1.0, 8.0], dtype=torch.float64)
    assert_close(cumulative_stretch(4, "yarn", 8.0, train_len=5), expected)


@pytest.mark.parametrize(("L", "k", "dim", "gap"), [(512, 8, 64, 1.38), (4096, 8, 128, 1.30), (2048, 16, 128, 2.08)])
def test_yarn_code_is_not_the_paper(L, k, dim, gap):
    code, paper = (rope_inv_freq(dim, method=m, scale=k, train_len=L) for m in ("yarn", "yarn_paper"))
    assert ((code - paper).abs() / paper).max().item() == pytest.approx(gap, abs=0.005)


def test_yarn_paper_by_its_definition():
    L, k, D = 512, 8.0, 32
    for j, theta in enumerate(rope_inv_freq(64, method="yarn_paper", scale=k, train_len=L).tolist()):
        plain = 10000 ** (-j / D)
        turns = L * plain / (2 * math.pi)
        gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        assert theta == pytest.approx((1 - gamma) * plain / k + gamma * plain, rel=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_no_stretch_at_scale_one(method):
    plain = rope_inv_freq(64)
    stretched = rope_inv_freq(64, method=method, scale=1.0, **options(method, 64, 512, 1))
    torch.testing.assert_close(stretched, plain, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [4, 32, 64, 128])
def test_frequencies_fall_and_stretch_is_between_one_and_k(method, dim):
    k, kwargs = 8.0, options(method, dim, 512, 8.0)
    if method == "dynamic":
        k = dynamic_scale(kwargs["length"], 512, k)
    assert (rope_inv_freq(dim, method=method, scale=8.0, **kwargs).diff() < 0).all()
    stretch = cumulative_stretch(dim, method, 8.0, **kwargs)
    assert (stretch.diff() >= 0).all()
    assert stretch.min() >= 1 and stretch.max() <= k * (1 + 1e-14)


def test_the_table_is_the_plain_one_over_the_stretch():
    for method in METHODS:
        kwargs = options(method, 64, 512, 8.0)
        stretch = cumulative_stretch(64, method, 8.0, base=500.0, **kwargs)
        table = rope_inv_freq(64, base=500.0, method=method, scale=8.0, **kwargs)
        torch.testing.assert_close(table, rope_inv_freq(64, base=500.0) / stretch, rtol=1e-14, atol=0)


def test_base_changes():
    assert_close(rope_inv_freq(64, method="ntk_old", scale=8.0), rope_inv_freq(64, base=8 * 10000.0))
    assert_close(rope_inv_freq(64, method="ntk", scale=8.0), rope_inv_freq(64, base=10000 * 8 ** (64 / 62)))


def test_mixed_joins_interpolation_and_fixed():
    for k in (2.0, 8.0, 16.0):
        for b, method in ((0.0, "pi"), (1.0, "ntk_fixed")):
            mixed = rope_inv_freq(64, method="ntk_mixed", scale=k, b=b)
            torch.testing.assert_close(mixed, rope_inv_freq(64, method=method, scale=k), rtol=1e-12, atol=0)


def test_the_released_patch_for_llama():
    """k = 12, b = 0.75, the setting of the author's patch: its table divides by exp(a m^b), a = ln k/(d/2)^b."""
    d, k, b = 128, 12.0, 0.75
    a = math.log(k) / (d / 2) ** b
    expected = [10000 ** (-2 * j / d) / math.exp(a * (j + 1) ** b) for j in range(d // 2)]
    assert_close(rope_inv_freq(d, method="ntk_mixed", scale=k, b=b), torch.tensor(expected, dtype=torch.float64))


def test_reference_numbers():
    fixed = cumulative_stretch(64, "ntk_fixed", 8.0)
    assert fixed[0].item() == pytest.approx(1.06714, abs=5e-6) and fixed[-1].item() == pytest.approx(8.0, rel=1e-15)
    assert cumulative_stretch(64, "ntk_old", 8.0)[-1].item() == pytest.approx(7.4967, abs=5e-5)
    mixed = cumulative_stretch(64, "ntk_mixed", 8.0)
    steps = mixed[1:] / mixed[:-1]
    assert mixed[0].item() == pytest.approx(1.2692, abs=5e-5)
    assert [steps[m].item() for m in (0, 1, 30)] == pytest.approx([1.1380, 1.1118, 1.0417], abs=5e-5)
    theta = rope_inv_freq(64, method="ntk_mixed", scale=8.0)
    assert theta[[0, 1, 15, 31]].tolist() == pytest.approx([0.7879213, 0.5192240, 3.4627e-3, 1.66690e-5], rel=2e-5)


def test_dynamic_overshoots_with_the_factor_that_was_meant():
    assert dynamic_scale(8 * 512, 512, 8) == 8 * 8 - 8 + 1 == 57
    assert dynamic_scale(8 * 512, 512, 1) == 8 and dynamic_scale(100, 512, 8) == 1


def test_attention_factors():
    assert yarn_attention_factor(8) == pytest.approx(1.2079441541679836, rel=1e-15)
    assert attention_factor("yarn_paper", 8) == yarn_attention_factor(8)
    assert {m for m in METHODS if attention_factor(m, 8.0, 512) != 1} == {"yarn", "yarn_paper", "longrope"}


def test_dtype_is_a_last_cast():
    table = rope_inv_freq(64, method="ntk_mixed", scale=8.0, dtype=torch.float32, device="cpu")
    assert table.dtype == torch.float32
    assert torch.equal(table, rope_inv_freq(64, method="ntk_mixed", scale=8.0).float())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 7}, "dim must be a positive even integer, got 7"),
        ({"dim": 0}, "dim must be a positive even integer, got 0"),
        ({"dim": -2}, "dim must be a positive even integer, got -2"),
        ({"dim": 8.0}, "dim must be a positive even integer, got 8.0"),
        ({"base": 1.0}, "base must be greater than 1, got 1.0"),
        ({"scale": 0.5}, "scale must be at least 1, got 0.5"),
        ({"scale": math.nan}, "scale must be at least 1, got nan"),
        ({"method": "ntk_odd"}, "method must be one of none, pi, ntk, .*, longrope, got 'ntk_odd'"),
        ({"method": "yarn"}, "train_len is required for method 'yarn'"),
        ({"method": "yarn_paper", "train_len": 1}, "train_len must be greater than 1, got 1"),
        ({"method": "ntk", "dim": 2}, "dim must be at least 4 for method 'ntk'"),
        ({"method": "ntk_mixed", "b": 1.5}, r"b must lie in \[0, 1\], got 1.5: .* non-increasing"),
        ({"method": "ntk_mixed", "b": -0.1}, r"b must lie in \[0, 1\], got -0.1: .* λ_m >= 1"),
        ({"method": "yarn", "train_len": 512, "alpha": 40}, "0 < alpha < beta_fast, got 40 and 32"),
        ({"method": "llama3", "train_len": 512, "alpha": 5}, "0 < alpha < beta_fast, got 5 and 4"),
        ({"method": "dynamic", "train_len": 512}, "length must be given and at least 1"),
        ({"method": "dynamic", "train_len": 512, "length": 0}, "length must be .* got 0"),
        ({"method": "longrope", "train_len": 512}, r"factors must be 4 positive numbers \(dim // 2\)"),
        ({"method": "longrope", "train_len": 512, "factors": [1, 2]}, "factors must be 4 positive numbers"),
        ({"method": "longrope", "train_len": 512, "factors": [1, 2, 0, 1]}, "factors must be 4 positive numbers"),
    ],
)
def test_bad_input(kwargs, message):
    kwargs = {"dim": 8, "scale": 2.0, **kwargs}
    with pytest.raises(ValueError, match=message):
        rope_inv_freq(kwargs.pop("dim"), **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: yarn_attention_factor(0.5), "scale must be at least 1, got 0.5"),
        (lambda: attention_factor("yarm", 8.0), "method must be one of none, pi, .*, got 'yarm'"),
        (lambda: attention_factor("longrope", 8.0), "train_len must be greater than 1 for .* got None"),
        (lambda: dynamic_scale(10, 0, 2), "train_len must be greater than 1, got 0"),
        (lambda: dynamic_scale(10, 5, 0.5), "factor must be at least 1, got 0.5"),
    ],
)
def test_bad_input_of_the_scales(call, message):
    with pytest.raises(ValueError, match=message):
        call()
