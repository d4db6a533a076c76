"""Projections: the two inequalities of the proof with membership, POT, scipy, non-convex sets that fail, errors."""

import math

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from kexue_utils.optimization import sgd_convergence as sgd
from kexue_utils.optimization.sgd_convergence.domains import moved
from tests.tolerances import assert_close

d = 4
A = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
DOMAINS = {
    "ball": sgd.Ball(1.5),
    "shifted ball": sgd.Ball(0.7, [1.0, -2.0, 0.5, 0.0]),
    "box": sgd.Box([-1.0, 0.0, -2.0, 0.5], [1.0, 0.5, 2.0, 0.5]),
    "simplex": sgd.Simplex(2.0),
    "l1 ball": sgd.L1Ball(1.2),
    "half-space": sgd.HalfSpace([1.0, -2.0, 0.5, 3.0], 0.4),
    "affine": sgd.Affine(A, [0.5, -1.0]),
    "unbounded": sgd.Unbounded(),
}


def inside(name, x):
    """Membership by the definition of each set, not by its projection."""
    domain = DOMAINS[name]
    if "ball" in name and name != "l1 ball":
        return (x - domain.center).norm(dim=-1) <= domain.R + 1e-9
    return {
        "box": lambda: ((x >= domain.lo) & (x <= domain.hi)).all(-1),
        "simplex": lambda: (x >= 0).all(-1) & ((x.sum(-1) - 2).abs() < 1e-9),
        "l1 ball": lambda: x.abs().sum(-1) <= 1.2 + 1e-9,
        "half-space": lambda: x @ domain.a <= 0.4 + 1e-9,
        "affine": lambda: ((x @ A.T - torch.tensor([0.5, -1.0])).abs() < 1e-9).all(-1),
        "unbounded": lambda: torch.ones_like(x[..., 0], dtype=torch.bool),
    }[name]()


def points(n, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def inequalities(project, phi, theta):
    """Obtuse angle and Pythagoras, as slacks that must not be negative."""
    nearest = project(phi)
    obtuse = ((nearest - theta) * (phi - nearest)).sum(-1)
    squares = [(v * v).sum(-1) for v in (phi - theta, nearest - theta, phi - nearest)]
    return obtuse, squares[0] - squares[1] - squares[2]


@pytest.mark.parametrize("name", DOMAINS)
def test_projection(name):
    project = DOMAINS[name].project
    phi, theta = points(100_000, 0), project(points(100_000, 1))
    nearest = project(phi)
    assert inside(name, nearest).all() and DOMAINS[name].contains(nearest).all()
    assert_close(project(theta), theta)
    assert all((slack >= -1e-9).all() for slack in inequalities(project, phi, theta))
    other = points(100_000, 2)
    assert ((nearest - project(other)).norm(dim=-1) <= (phi - other).norm(dim=-1) + 1e-12).all()
    if name != "unbounded":
        assert not DOMAINS[name].contains(phi).all() and (DOMAINS[name].contains(phi) == inside(name, phi)).all()


@pytest.mark.parametrize("name", ["ball", "box", "simplex", "l1 ball"])
def test_projection_is_the_nearest_point(name):
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d).numpy()
    constraints = {
        "ball": [{"type": "ineq", "fun": lambda x: 1.5**2 - x @ x}],
        "simplex": [{"type": "eq", "fun": lambda x: x.sum() - 2}],
        "l1 ball": [{"type": "ineq", "fun": lambda x, s=s: 1.2 - x @ s} for s in corners],
        "box": [],
    }[name]
    box = list(zip(DOMAINS["box"].lo.tolist(), DOMAINS["box"].hi.tolist(), strict=True))
    how = {"bounds": {"box": box, "simplex": [(0, None)] * d}.get(name), "constraints": constraints, "jac": True}
    for phi in points(20, 3, 1.0).numpy():

        def squares(x, phi=phi):
            return ((x - phi) ** 2).sum(), 2 * (x - phi)

        found = minimize(squares, [0.5] * d, method="SLSQP", options={"ftol": 1e-14, "maxiter": 300}, **how)
        assert_close(
            DOMAINS[name].project(torch.tensor(phi)), torch.tensor(found.x), scale=1e7
        )  # the solver's own accuracy


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.1, 5))
def test_simplex_equals_pots(values, s):
    x = torch.tensor(values, dtype=torch.float64)
    assert_close(sgd.Simplex(s).project(x), ot.utils.proj_simplex(x[:, None], s)[:, 0], scale=10)  # sums of 8 up to 80


@pytest.mark.parametrize("name", ["ball", "shifted ball", "box", "simplex", "l1 ball"])
def test_extreme_points_and_diameters(name):
    domain, v = DOMAINS[name], points(20_000, 4)
    extreme, theta = domain.extreme(v), domain.project(points(20_000, 5))
    assert inside(name, extreme).all()
    assert ((v * (extreme - theta)).sum(-1) >= -1e-9).all()
    width = (domain.extreme(v) - domain.extreme(-v)).norm(dim=-1)
    assert width.max() <= domain.diameter + 1e-9 and width.max() > 0.98 * domain.diameter
    assert all(math.isinf(DOMAINS[other].diameter) for other in ("half-space", "affine", "unbounded"))


@pytest.mark.parametrize("name", DOMAINS)
def test_shapes_and_dtypes(name):
    x = points(6, 6)
    many = DOMAINS[name].project(x.reshape(2, 3, d))
    assert_close(many.reshape(6, d), torch.stack([DOMAINS[name].project(row) for row in x]))
    single = moved(DOMAINS[name], x.float()).project(x.float())
    assert single.dtype == torch.float32
    assert_close(single, DOMAINS[name].project(x).float(), scale=4)  # half-spaces divide by a sum
    assert DOMAINS[name].project(x).dtype == torch.float64


def test_edges():
    assert sgd.Ball(2.0).project(torch.zeros(3)).tolist() == [0, 0, 0]
    assert sgd.Simplex().project(torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.5]
    assert sgd.L1Ball(2.0).project(torch.tensor([0.0, -2.0])).tolist() == [0, -2]
    interval = sgd.Box(-1.0, 3.0)
    assert interval.diameter == 4 and interval.project(torch.tensor([[5.0], [0.5]])).tolist() == [[3], [0.5]]
    rooms, normals, bend = sgd.Ball(2.0, [1.0, 0.0]).rooms(torch.tensor([[1.0, 1.0]]))
    assert rooms.tolist() == [[3]] and normals.tolist() == [[[0, -2]]] and bend == 2
    rooms, normals, bend = sgd.Box([0.0, 0.0], [2.0, 3.0]).rooms(torch.tensor([[0.5, 1.0]]))
    assert rooms.tolist() == [[0.5, 1.0, 1.5, 2.0]] and bend == 0
    assert normals.tolist() == [[[1, 0], [0, 1], [-1, 0], [0, -1]]]


def test_sets_and_maps_that_are_no_projections():
    """Non-convex sets break the inequalities; a map that projects too little is found by membership alone."""
    theta, phi = points(100_000, 7), points(100_000, 8)

    def sphere(x):
        return x / x.norm(dim=-1, keepdim=True)

    def annulus(x):
        size = x.norm(dim=-1, keepdim=True)
        return x / size * size.clamp(1.0, 2.0)

    for project in (sphere, annulus):
        obtuse, pythagoras = inequalities(project, phi / 4, project(theta))
        assert (obtuse < -1e-3).any() and (pythagoras < -1e-3).any()

    def largest_entry(x):
        return x / x.abs().amax(-1, keepdim=True).clamp(min=1)

    obtuse, pythagoras = inequalities(largest_entry, phi, sgd.Ball(1.0).project(theta))
    assert (obtuse > -1e-9).all() and (pythagoras > -1e-9).all()
    assert not sgd.Ball(1.0).contains(largest_entry(phi)).all()

    def clip_and_share(x):
        x = x.clamp(min=1e-12)
        return x / x.sum(-1, keepdim=True)

    obtuse, _ = inequalities(clip_and_share, phi, sgd.Simplex().project(theta))
    assert sgd.Simplex().contains(clip_and_share(phi)).all() and (obtuse < -1e-3).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd.Ball(0), "R must be positive and finite, got 0"),
        (lambda: sgd.Ball(math.inf), "R must be positive and finite, got inf"),
        (lambda: sgd.Ball(1, [math.nan]), r"center must be finite, got \[nan\]"),
        (lambda: sgd.Box([0, 2], [1, 1]), "lo must not exceed hi, got lo=2 > hi=1 in coordinate 1"),
        (lambda: sgd.Box([0, 2], 3), r"lo and hi must have one shape, got \(2,\) and \(1,\)"),
        (lambda: sgd.Box(0, math.inf), r"hi must be finite, got \[inf\]"),
        (lambda: sgd.Box(0, 1).project(torch.zeros(3)), r"x must have 1 coordinates like the box, got shape \(3,\)"),
        (lambda: sgd.Simplex(-1), "s must be positive and finite, got -1"),
        (lambda: sgd.L1Ball(0), "R must be positive and finite, got 0"),
        (lambda: sgd.HalfSpace([0, 0], 1), "a must not be zero"),
        (lambda: sgd.Affine([[1.0, 0], [2, 0]], [1, 2]), "full row rank below its 2 columns, got 2 rows of rank 1"),
        (lambda: sgd.Affine([[1.0, 0], [0, 1]], [1, 2]), "got 2 rows of rank 2"),
        (lambda: sgd.Affine([[1.0, 0]], [1, 2]), r"A must have a row for each of 2 entries of b, got \(1, 2\)"),
        (lambda: sgd.Unbounded().extreme(torch.ones(2)), "bounded to have an extreme point, got Unbounded"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
