"""Compiled steps, one at a time or several at once, take the same path as the plain ones."""

import pytest
import torch

from kexue_utils.optimization import sgd_convergence as sgd
from kexue_utils.optimization.sgd_convergence.engine import CHUNK, UNROLL
from tests.tolerances import assert_close


@pytest.mark.parametrize("record", [[], ["loss"]])
def test_compiled_steps_are_the_same(record):
    problem, eta = sgd.Logistic([0.9, -0.6, 0.3]), sgd.inv_sqrt(100, 0.5)
    assert CHUNK % UNROLL == 0 and 100 % UNROLL  # some steps are left over
    start = torch.zeros(20, 3, dtype=torch.float64)
    plain, compiled = (
        sgd.run_sgd(problem, sgd.Ball(0.8), eta, start, comparator=start + 0.1, record=record, compile=flag)
        for flag in (False, True)
    )
    for name in ("final", "last", "average", "online_loss", "comparator_loss"):
        assert_close(getattr(compiled, name), getattr(plain, name))
    for name in record:
        assert_close(compiled.records[name], plain.records[name])
