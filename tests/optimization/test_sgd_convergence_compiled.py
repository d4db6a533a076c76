"""The compiled step takes the same path as the plain one."""

import torch

from kexue_utils.optimization import sgd_convergence as sgd
from tests.tolerances import assert_close


def test_compiled_steps_are_the_same():
    problem, eta = sgd.Logistic([0.9, -0.6, 0.3]), sgd.inv_sqrt(100, 0.5)
    start = torch.zeros(20, 3, dtype=torch.float64)
    plain, compiled = (sgd.run_sgd(problem, sgd.Ball(0.8), eta, start, compile=flag) for flag in (False, True))
    assert_close(compiled.final, plain.final)
    assert_close(compiled.online_loss, plain.online_loss)
