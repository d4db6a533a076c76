"""What checking a chapter costs: 28 equations of every kind with all their mutants, on one core. Aim: 15 s."""

import contextlib
import io
import os
import time

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
import sympy as sp
import torch

from benchmarks.timing import header
from kexue_utils.attention.naive_bayes_attention import combine_log_probs, strict_naive_bayes
from kexue_utils.ledger import Mean, Slope, check, show

SIZES = (2, 5, 9)  # of the vectors, by which the numeric checks are repeated


def rotation(m, theta=0.3):
    c, s = np.cos(m * theta), np.sin(m * theta)
    return np.array([[c, -s], [s, c]])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def newton(x, steps):
    y = x
    while steps > 0:
        y = (y + x / y) / 2
        steps -= 1
    return y


class Attention(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k = torch.nn.Linear(d, d).double(), torch.nn.Linear(d, d).double()

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5
        return scores.softmax(-1) @ x


def relative(rng):
    m, n = rng.integers(1, 50, 2)
    q, k = rng.normal(size=(2, 2))
    return (rotation(m) @ q) @ (rotation(n) @ k), q @ rotation(n - m) @ k, q @ rotation(m - n) @ k


def angles(rng):
    m, n = rng.integers(1, 50, 2)
    return rotation(m) @ rotation(n), rotation(m + n), rotation(m - n)


def at_zero():
    return rotation(0), [[1, 0], [0, 1]], [[1, 0], [0, -1]]


def root(rng):
    x = rng.uniform(1, 9)
    return newton(x, 8), np.sqrt(x), x / 2


def numeric(d):
    def shift(rng):
        x, c = rng.normal(size=d), rng.normal()
        return softmax(x + c), np.exp(x) / np.exp(x).sum(), np.exp(2 * x) / np.exp(2 * x).sum()

    def jacobian(rng):
        x = torch.from_numpy(rng.normal(size=d))
        p = x.softmax(0)
        return torch.func.jacrev(lambda y: y.softmax(0))(x), torch.diag(p) - torch.outer(p, p), torch.diag(p)

    def pool(rng):
        p, a = torch.from_numpy(rng.dirichlet(np.ones(d), size=4)), torch.from_numpy(rng.dirichlet(np.ones(4)))
        geometric = (p ** a[:, None]).prod(0)
        return combine_log_probs(p.log(), weights=a).exp(), geometric / geometric.sum(), a @ p

    def strict(rng):
        p = torch.from_numpy(rng.dirichlet(np.ones(d), size=5)).log()
        formula, wrong = p[1:].sum(0) - 3 * p[0], p[1:].sum(0) - 4 * p[0]
        return strict_naive_bayes(p[1:], p[0]), formula.log_softmax(0), wrong.log_softmax(0)

    def attention(rng):
        layer, x = Attention(d), torch.from_numpy(rng.normal(size=(6, d)))
        q, k = layer.q(x), layer.k(x)
        a = torch.exp(q @ k.mT / d**0.5)
        return layer(x), a / a.sum(1, keepdim=True) @ x, a / a.sum(0) @ x

    return [(shift, [softmax]), (jacobian, []), (pool, [combine_log_probs]),
            (strict, [strict_naive_bayes]), (attention, [Attention])]  # fmt: skip


def addition():
    x, y = sp.symbols("x y", real=True)
    return sp.sin(x + y), sp.sin(x) * sp.cos(y) + sp.cos(x) * sp.sin(y), sp.sin(x) + sp.sin(y)


def powers():
    x, y = sp.symbols("x y")
    return (x + y) ** 8 - (x - y) ** 8, 16 * x * y * (x**2 + y**2) * (x**4 + 6 * x**2 * y**2 + y**4), x**8


def product_rule():
    x, f, g = sp.Symbol("x", real=True), sp.Function("f"), sp.Function("g")
    return sp.diff(f(x) * g(x), x), f(x).diff(x) * g(x) + f(x) * g(x).diff(x), f(x).diff(x) * g(x).diff(x)


def matrices():
    A, B = sp.MatrixSymbol("A", 2, 2), sp.MatrixSymbol("B", 2, 2)
    return (A * B).T, B.T * A.T, A.T * B.T


def half_angle():
    x = sp.Symbol("x", real=True)
    return sp.tanh(x), (sp.exp(2 * x) - 1) / (sp.exp(2 * x) + 1), sp.exp(x) / (sp.exp(x) + 1)


def sums():
    for n in range(2, 12):
        yield sum(k * k for k in range(n)), (n - 1) * n * (2 * n - 1) // 6, n * (n + 1) * (2 * n + 1) // 6


def jensen(rng, tight):
    x = np.full(5, rng.normal()) if tight else rng.normal(size=5)
    return np.exp(x.mean()), np.exp(x).mean(), np.exp(x).min()


def central(rng):
    h, x = 2.0 ** -np.arange(3, 10), rng.normal()
    return Slope(h, np.abs((np.sin(x + h) - np.sin(x - h)) / (2 * h) - np.cos(x))), 2, 1


def moments(rng):
    x = rng.normal(size=(100_000, 2))
    return Mean(np.c_[x**2, x[:, 0] * x[:, 1]]), np.array([1.0, 1.0, 0.0]), np.array([0.5, 1.0, 0.0])


CHECKS = [(relative, [rotation]), (angles, [rotation]), (at_zero, [rotation]), (root, [newton]), (addition, []),
          (powers, []), (product_rule, []), (matrices, []), (sums, []), (jensen, []), (central, []), (moments, []),
          (half_angle, [])]  # fmt: skip
CHECKS += [pair for size in SIZES for pair in numeric(size)]


def main():
    header("cpu", ("sympy", "numpy"), threads=1)
    print(f"{'check':14}{'kind':13}{'mutants':>8}{'s':>8}")
    total, count = 0.0, 0
    for number, (function, of) in enumerate(CHECKS, 1):
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            check(f"{function.__name__}-{number}", of=of)(function)
        seconds, bundle = time.process_time() - start, show.records[-1]
        mutants = len(bundle["mutants"]) + sum(map(len, bundle["functions"].values()))
        total, count = total + seconds, count + mutants
        print(f"{function.__name__:14}{bundle['kind']:13}{mutants:8}{seconds:8.2f}")
    print(f"{len(show.records)} checks{count:25}{total:8.2f}")


if __name__ == "__main__":
    main()
