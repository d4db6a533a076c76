"""What the solvers of the chapter share: the error of an iteration that fails, and two rules about arguments."""

import math


class ConvergenceError(RuntimeError):
    """An iteration ended without a solution; the message says where it stood."""


def require_positive(**arguments):
    """Each is a finite number greater than 0."""
    for name, value in arguments.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def require_count(**arguments):
    """Each is an integer and at least 1."""
    for name, value in arguments.items():
        if value != int(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
