"""Saddle-free Newton: against dense linear algebra, and off a saddle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import SaddleFreeNewton
from lightrail_optimizers.saddle_free_newton import krylov_basis, saddle_free_step

CLOSE = {"rtol": 0, "atol": 1e-9}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return q @ torch.diag(eigenvalues) @ q.T


def test_the_step_by_hand():
    x = parameter(0.5, -0.25)  # where the gradient of x² - 2y² is (1, 1)
    optimizer = SaddleFreeNewton([x], damping=0.0)
    optimizer.step(Closure(lambda: x[0] ** 2 - 2 * x[1] ** 2, [x]))
    torch.testing.assert_close(x.detach() - doubles(0.5, -0.25), doubles(-0.5, -0.25), **CLOSE)
    assert optimizer.logged() == {"negative_curvatures": 1.0, "chosen_damping": 0.0}


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_in_the_whole_space_it_is_the_dense_formula(damping):
    matrix, b = symmetric(doubles(-3.0, -0.2, 0.1, 1.0, 5.0, 20.0)), torch.linspace(-1, 1, 6, dtype=torch.float64)
    one, other, start = parameter(1.0, 2.0), parameter(0.5, -1.0, 0.0, 0.25), doubles(1.0, 2.0, 0.5, -1.0, 0.0, 0.25)

    def loss():
        x = torch.cat([one, other])
        return x @ matrix @ x / 2 + b @ x

    optimizer = SaddleFreeNewton([one, other], damping=damping, lr=0.7, krylov_dimension=6)
    optimizer.step(Closure(loss, [one, other]))
    eigenvalues, q = torch.linalg.eigh(matrix)
    step = -q @ torch.diag(1 / (eigenvalues.abs() + damping)) @ q.T @ (matrix @ start + b)
    torch.testing.assert_close(torch.cat([one, other]).detach(), start + 0.7 * step, **CLOSE)
    assert optimizer.logged()["negative_curvatures"] == 2


def test_on_a_convex_quadratic_it_is_newton():
    eigenvalues = doubles(0.5, 0.5, 2.0, 2.0, 2.0, 9.0)  # three curvatures, so three products
    matrix = symmetric(eigenvalues)
    x = parameter(1.0, -2.0, 3.0, 0.5, 0.0, 1.0)
    closure = Closure(lambda: x @ matrix @ x / 2, [x])
    SaddleFreeNewton([x], damping=0.0, krylov_dimension=5).step(closure)
    torch.testing.assert_close(x.detach(), torch.zeros(6, dtype=torch.float64), **CLOSE)
    assert closure.evaluations == 1 + 3


def test_lanczos_keeps_its_basis_orthonormal():
    eigenvalues = torch.logspace(-6, 6, 80, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(40)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        matrix = symmetric(eigenvalues).to(dtype)
        v, t = krylov_basis(lambda x, m=matrix: m @ x, torch.ones(80, dtype=dtype), 40)
        assert (v @ v.T - torch.eye(len(v), dtype=dtype)).abs().max() < bound
        assert torch.equal(t, t.T)
        exact = v.double() @ symmetric(eigenvalues) @ v.double().T
        assert (t - exact).abs().max() < 10 * bound * exact.abs().max()


def test_an_invariant_subspace_ends_it():
    matrix = torch.diag(doubles(1.0, 1.0, -2.0, 0.0))
    v, t = krylov_basis(lambda x: matrix @ x, doubles(1.0, 2.0, 3.0, 0.0), 4)
    assert v.shape == (2, 4)
    torch.testing.assert_close(torch.linalg.eigvalsh(t), doubles(-2.0, 1.0), **CLOSE)
    for g in (torch.zeros(4), torch.tensor([1.0, math.nan, 0.0, 0.0])):
        v, t = krylov_basis(lambda x: x, g, 3)
        assert v.shape == (0, 4)
        assert not saddle_free_step(v, t, g, damping=0.1).any()


def test_a_product_that_is_not_finite_ends_it():
    v, t = krylov_basis(lambda x: x * math.inf, torch.ones(3), 3)
    assert (v.shape, t.shape) == ((0, 3), (0, 0))


def test_without_curvature_only_damping_sets_the_step():
    for damping, end in ((0.0, 1.0), (2.0, 1.0 - 3.0 / 2.0)):
        x = parameter(1.0)
        optimizer = SaddleFreeNewton([x], damping=damping)
        optimizer.step(Closure(lambda x=x: 3 * x.sum(), [x]))
        assert x.item() == pytest.approx(end, abs=1e-12)
        assert optimizer.logged()["negative_curvatures"] == 0


def test_it_leaves_a_saddle_that_holds_gradient_descent_and_draws_newton():
    def loss(x):
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4

    def steps_to_leave(make, most=400):
        x = parameter(1.0, 1e-3)
        optimizer = make([x])
        for t in range(1, most):
            optimizer.step(Closure(lambda: loss(x), [x]))
            if x[1].abs() >= 0.1:
                return t
        return most

    ours = steps_to_leave(lambda p: SaddleFreeNewton(p, damping=1e-3))
    assert ours <= 10
    assert steps_to_leave(lambda p: torch.optim.SGD(p, lr=0.01)) > 20 * ours

    x = doubles(1.0, 1e-3)
    for _ in range(5):
        g, h = torch.autograd.functional.jacobian(loss, x), torch.autograd.functional.hessian(loss, x)
        x = x - torch.linalg.solve(h, g)
    assert x.abs().max() < 1e-9  # at the saddle

    x = parameter(1.0, 1e-3)
    optimizer = SaddleFreeNewton([x], damping=0.1)
    for _ in range(60):
        optimizer.step(Closure(lambda: loss(x), [x]))
    torch.testing.assert_close(x.detach(), doubles(0.0, 2**0.5), rtol=0, atol=1e-4)
    assert optimizer.logged()["negative_curvatures"] == 0


def test_of_several_dampings_each_step_takes_the_best():
    def loss(x):
        return (x**4).sum() / 4 + (0.5 * x).sum()

    x = parameter(1.0, -0.2)
    dampings, start = [10.0, 2.0, 0.1], x.detach().clone()
    ends = []
    for damping in dampings:
        alone = nn.Parameter(start.clone())
        SaddleFreeNewton([alone], damping=damping).step(Closure(lambda a=alone: loss(a), [alone]))
        ends.append(alone.detach())
    best = min(range(3), key=lambda i: loss(ends[i]).item())
    optimizer, closure = SaddleFreeNewton([x], damping=dampings), Closure(lambda: loss(x), [x])
    optimizer.step(closure)
    assert torch.equal(x.detach(), ends[best])
    assert optimizer.logged()["chosen_damping"] == dampings[best]
    assert closure.evaluations == 1 + 2 + 3
    assert best == 1


def test_a_search_passes_over_a_loss_that_is_not_finite():
    x = parameter(1.0)
    optimizer = SaddleFreeNewton([x], damping=[0.0, 10.0])
    optimizer.step(Closure(lambda: (x.log() ** 2 + x).sum() * torch.where(x < 0.6, math.nan, 1.0).sum(), [x]))
    assert optimizer.logged()["chosen_damping"] == 10.0


def test_groups_scale_their_part_of_one_step():
    matrix = symmetric(doubles(-1.0, 2.0))

    def end(*rates):
        a, b = parameter(1.0), parameter(-2.0)
        groups = [{"params": [p], "lr": rate} for p, rate in zip((a, b), rates, strict=True)]
        x = lambda: torch.cat([a, b])  # noqa: E731
        SaddleFreeNewton(groups, damping=0.5).step(Closure(lambda: x() @ matrix @ x() / 2, [a, b]))
        return x().detach() - doubles(1.0, -2.0)

    torch.testing.assert_close(end(0.5, 0.25), end(1.0, 1.0) * doubles(0.5, 0.25), **CLOSE)


def test_accumulation_is_the_same_as_one_batch():
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, dtype=torch.float64)
    ends = []
    for batches in ([inputs], list(inputs.split(2))):
        w = parameter(1.0, 2.0, 3.0)
        optimizer = SaddleFreeNewton([w], krylov_dimension=2)
        for _ in range(3):
            optimizer.step(Closure(lambda batch, w=w: ((batch @ w).cos()).mean(), [w], *batches))
        ends.append(w.detach())
    torch.testing.assert_close(*ends, **CLOSE)


def test_a_plain_closure_is_refused():
    x = parameter(1.0)
    for closure in (None, lambda: torch.zeros(())):
        with pytest.raises(ClosureError, match="SaddleFreeNewton"):
            SaddleFreeNewton([x]).step(closure)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"krylov_dimension": 0}, {"damping": -0.1}, {"damping": []}, {"damping": [0.1, -1]}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=r"damping|lr|krylov"):
        SaddleFreeNewton([parameter(1.0)], **options)
