"""Average and last-iterate convergence of stochastic gradient descent on convex losses.

Source: 《让炼丹更科学一些（一）：SGD的平均损失收敛》, Jianlin Su, https://kexue.fm/archives/9902
"""

from .bounds import (
    anytime_curve,
    average_bound_unbounded,
    best_scale,
    best_schedule,
    core_bound,
    core_bound_general,
    last_iterate_bound,
    last_iterate_bound_inv,
    sharp_linear_bound,
    weighted_bound,
)
from .domains import Affine, Ball, Box, Domain, HalfSpace, L1Ball, Simplex, Unbounded
from .engine import RunResult, SlackLedger, draw, run_sgd, sgd_step
from .exact import (
    Expectation,
    WorstCase,
    exact_expectation,
    mean_abs_walk,
    worst_grid_regret,
    worst_sign_sequence,
)
from .extremal import (
    CubeWorstCase,
    HarveyLowerBound,
    Linear,
    LinearAdversary,
    MaxAffine,
    Rademacher,
    TwoPointAbs,
    walk_and_rattle,
)
from .hindsight import Hindsight, duality_gap, hindsight_optimum
from .problems import ConvexProblem, Hinge, Huber, LeastAbsolute, LinearModel, Logistic, Quantile
from .rates import fit_rate
from .schedules import constant, cosine, inv_sqrt, inv_t, is_nonincreasing, linear_decay, polynomial, step, warmup, wsd

__all__ = [
    "Affine",
    "Ball",
    "Box",
    "ConvexProblem",
    "CubeWorstCase",
    "Domain",
    "Expectation",
    "HalfSpace",
    "HarveyLowerBound",
    "Hindsight",
    "Hinge",
    "Huber",
    "L1Ball",
    "LeastAbsolute",
    "Linear",
    "LinearAdversary",
    "LinearModel",
    "Logistic",
    "MaxAffine",
    "Quantile",
    "Rademacher",
    "RunResult",
    "Simplex",
    "SlackLedger",
    "TwoPointAbs",
    "Unbounded",
    "WorstCase",
    "anytime_curve",
    "average_bound_unbounded",
    "best_scale",
    "best_schedule",
    "constant",
    "core_bound",
    "core_bound_general",
    "cosine",
    "draw",
    "duality_gap",
    "exact_expectation",
    "fit_rate",
    "hindsight_optimum",
    "inv_sqrt",
    "inv_t",
    "is_nonincreasing",
    "last_iterate_bound",
    "last_iterate_bound_inv",
    "linear_decay",
    "mean_abs_walk",
    "polynomial",
    "run_sgd",
    "sgd_step",
    "sharp_linear_bound",
    "step",
    "walk_and_rattle",
    "warmup",
    "weighted_bound",
    "worst_grid_regret",
    "worst_sign_sequence",
    "wsd",
]
