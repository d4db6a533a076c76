"""Worlds small enough to enumerate, where naive Bayes is exactly right.

A joint distribution of x_1..x_t is a tensor of t dimensions of size V, dimension i holding x_{i+1}.
Source: https://kexue.fm/archives/9648
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pooling import log_normalize


class NaiveBayesWorld(NamedTuple):
    """Tokens x_1..x_{t−1} that are independent given x_t: p(x_1..x_t) = p(x_t) Π_j p(x_j|x_t) (nb-independence).

    log_prior: (V,), log p(x_t). log_likelihood: (t−1, V, V), log p(x_j|x_t) at [j, x_t, x_j].
    """

    log_prior: Tensor
    log_likelihood: Tensor

    def log_joint(self) -> Tensor:
        """log p(x_1..x_t) of every sequence: t dimensions of size V."""
        joint = self.log_prior
        V = len(joint)
        for likelihood in self.log_likelihood.flip(0):
            joint = likelihood.T.reshape(V, *[1] * (joint.ndim - 1), V) + joint
        return joint


def exact_nb_world(V: int, t: int, seed: int | np.random.Generator) -> NaiveBayesWorld:
    """A random naive Bayes world: p(x_t) ~ Dirichlet(1), then every row p(·|x_t) of each position j ~ Dirichlet(1).

    V >= 2 candidates, sequences of t >= 1 tokens, a seed or a generator that is drawn from in that order.
    Float64 on the CPU. Raises ValueError for V or t out of range.
    """
    if V < 2:
        raise ValueError(f"V must be >= 2, got {V}")
    if t < 1:
        raise ValueError(f"t must be >= 1, got {t}")
    g = np.random.default_rng(seed)
    prior = g.dirichlet(np.ones(V))
    likelihood = np.array([g.dirichlet(np.ones(V), size=V) for _ in range(t - 1)]).reshape(-1, V, V)
    return NaiveBayesWorld(torch.from_numpy(prior).log(), torch.from_numpy(likelihood).log())


def posterior_by_enumeration(log_joint: Tensor) -> Tensor:
    """log p(x_t|x_{<t}) = log p(x_1..x_t) − log Σ_{x_t} p(x_1..x_t) of any joint (nb-bayes).

    log_joint: t dimensions of size V; returns the same shape, normalised over its last dimension. A history
    of probability 0 has no posterior and stays −inf. Raises ValueError where the dimensions differ in size.
    """
    _require_joint(log_joint)
    return log_normalize(log_joint)


def conditionals_by_enumeration(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Prior and experts of any joint, by summation: log p(x_t) and log p(x_t|x_j) for every j < t.

    log_joint: t dimensions of size V, every marginal p(x_j) > 0. Returns log_prior (V,) and log_cond
    (t−1, V, V), log p(x_t|x_j) at [j, x_j, x_t]. Raises ValueError where the dimensions differ in size.
    """
    _require_joint(log_joint)
    t, V = log_joint.ndim, len(log_joint)
    log_prior = log_joint.reshape(-1, V).logsumexp(0)
    pairs = log_joint.new_empty(t - 1, V, V)
    for j, _ in enumerate(pairs):
        pairs[j] = log_joint.movedim(j, -2).reshape(-1, V, V).logsumexp(0)
    return log_prior, log_normalize(pairs)


def _require_joint(log_joint: Tensor) -> None:
    if log_joint.ndim < 1 or len(set(log_joint.shape)) != 1:
        raise ValueError(f"log_joint must have t >= 1 dimensions of one size V, got {tuple(log_joint.shape)}")
