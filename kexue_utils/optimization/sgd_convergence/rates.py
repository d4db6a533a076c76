"""Rates of convergence from measurements."""

import torch
from torch import Tensor


def fit_rate(T: Tensor, y: Tensor, yerr: Tensor) -> tuple[float, float]:
    """Slope of log y against log T by weighted least squares, and its standard error   (sgd-sqrt)

    T, y, yerr: (n,), n ≥ 2, positive; yerr: standard errors of y, so log y has yerr/y. The standard error of the slope
    takes the points as independent: values along one run are not, so use separate runs for each T.
    Raises ValueError for fewer than two different T and for values that are not positive.
    """
    T, y, yerr = (torch.as_tensor(value, dtype=torch.float64) for value in (T, y, yerr))
    for name, value in (("T", T), ("y", y), ("yerr", yerr)):
        if not (value > 0).all():
            raise ValueError(f"{name} must be positive, got {value.min():g}")
    if len(T.unique()) < 2:
        raise ValueError(f"T must hold two different values at least, got {T.tolist()}")
    weight = (y / yerr) ** 2
    x = T.log() - (weight * T.log()).sum() / weight.sum()
    information = (weight * x * x).sum()
    return float((weight * x * y.log()).sum() / information), float(information**-0.5)
