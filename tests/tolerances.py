"""The tolerances of all tests, by dtype: about 50 units in the last place, for a short chain of operations."""

import torch

TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None, scale: float = 1.0):
    """Compare with the tolerance of ``dtype`` (that of ``actual``), ``scale`` times looser where a test says why."""
    tolerance = {name: scale * value for name, value in TOLERANCES[dtype or actual.dtype].items()}
    torch.testing.assert_close(actual, expected, check_dtype=False, **tolerance)
