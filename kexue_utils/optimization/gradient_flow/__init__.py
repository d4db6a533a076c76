"""Gradient flows of points and of densities: descent, proximal and JKO steps, Fokker–Planck, Langevin.

Source: 《梯度流：探索通向最小值之路》, Jianlin Su, https://kexue.fm/archives/9660
"""

from .divergences import DIVERGENCES, FDivergence, f_divergence
from .entropic import EntropicStep, entropic_jko_step
from .errors import ConvergenceError
from .euclidean import NORMS, gd_path, gradient_flow, modified_gradient, prox_path, steepest_direction
from .fokker_planck import FokkerPlanck, bernoulli
from .gaussian import GaussianTarget, bures_w2
from .langevin import LangevinRun, langevin, log_proposal
from .quantile_jko import JKOInfo, QuantileJKO1D
from .transport import w2_1d

__all__ = [
    "DIVERGENCES",
    "NORMS",
    "ConvergenceError",
    "EntropicStep",
    "FDivergence",
    "FokkerPlanck",
    "GaussianTarget",
    "JKOInfo",
    "LangevinRun",
    "QuantileJKO1D",
    "bernoulli",
    "bures_w2",
    "entropic_jko_step",
    "f_divergence",
    "gd_path",
    "gradient_flow",
    "langevin",
    "log_proposal",
    "modified_gradient",
    "prox_path",
    "steepest_direction",
    "w2_1d",
]
