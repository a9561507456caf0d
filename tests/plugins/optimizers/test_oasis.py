"""OASIS: the step size by hand, the scaling, and what it asks of the closure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.testing.optimizer import CHECKS
from lightrail.testing.suite import examine, name_of
from lightrail.traits import traits_of
from lightrail_optimizers import OASIS
from lightrail_optimizers.oasis import oasis_step_size
from lightrail_optimizers.sophia_rule import draw_directions

CLOSE = {"rtol": 0, "atol": 1e-9}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


def test_on_a_quadratic_the_second_step_size_is_a_half():
    x, curvature = parameter(1.0, 1.0), doubles(1.0, 100.0)
    optimizer = OASIS([x], lr=1e-3, warm_up=1)
    for point, eta in ((0.999, 1e-3), (0.4995, 0.5)):
        optimizer.step(Closure(lambda: (curvature * x**2).sum() / 2, [x]))
        torch.testing.assert_close(x.detach(), doubles(point, point), **CLOSE)
        assert optimizer.logged()["step_size"] == pytest.approx(eta, abs=1e-12)


def test_the_whole_method_in_numpy_terms():
    """Losses that change from step to step, with a Hessian that is diagonal, so that signs estimate it exactly."""
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=3), rng.normal(size=3) * 2) for _ in range(12)]
    w, lr, b2, alpha = parameter(1.0, -2.0, 0.5), 1e-2, 0.8, 0.3
    optimizer = OASIS([w], lr, b2, alpha, warm_up=2)
    x, d, eta, theta, before, grew = np.array([1.0, -2.0, 0.5]), None, lr, math.inf, None, 0
    for a, b in batches:

        def loss(a=a, b=b):
            return (w**4 / 12 + torch.from_numpy(a) * w**2 / 2 + torch.from_numpy(b) * w).sum()

        def slope(x, a=a, b=b):
            return x**3 / 3 + a * x + b

        hessian = x**2 + a
        d = hessian if d is None else b2 * d + (1 - b2) * hessian
        scale = np.maximum(np.abs(d), alpha)
        if before is not None:
            dx, dg = x - before, slope(x) - slope(before)
            bound = 0.5 * np.sqrt((scale * dx**2).sum() / (dg**2 / scale).sum())
            found = min(np.sqrt(1 + theta) * eta, bound)
            grew += found < bound
            eta, theta = found, found / eta
        before, x = x, x - eta * slope(x) / scale
        optimizer.step(Closure(loss, [w]))
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=0, atol=1e-9)
    assert 0 < grew < len(batches) - 1  # both bounds were met


def test_curvatures_that_change_sign_cancel_before_the_magnitude_is_taken():
    x = parameter(0.0)
    optimizer = OASIS([x], beta2=0.5, alpha=1e-3, adaptive=False, lr=0.0, warm_up=1)
    for sign in (1.0, -1.0):
        optimizer.step(Closure(lambda sign=sign: sign * (x**2).sum() / 2, [x]))
    assert optimizer.state[x]["curvature"].item() == 0.0


def test_without_curvature_it_is_adaptive_gradient_descent():
    """Malitsky and Mishchenko, 2020: the same step size in the Euclidean norm."""
    torch.manual_seed(0)
    inputs = torch.randn(20, 4, dtype=torch.float64)

    def loss(x):
        return torch.nn.functional.softplus(inputs @ x).mean()

    w = parameter(0.5, -0.5, 1.0, 0.0)
    optimizer = OASIS([w], lr=1e-3, alpha=1.0, warm_up=1)  # no curvature of this loss reaches 1
    x, before, eta, theta = w.detach().clone(), None, 1e-3, math.inf
    for _ in range(8):
        g = torch.autograd.functional.jacobian(loss, x)
        if before is not None:
            found = min((1 + theta) ** 0.5 * eta, 0.5 * ((x - before[0]).norm() / (g - before[1]).norm()).item())
            eta, theta = found, found / eta
        before, x = (x, g), x - eta * g
        optimizer.step(Closure(lambda: loss(w), [w]))
        assert optimizer.state[w]["curvature"].abs().max() < 1
        torch.testing.assert_close(w.detach(), x, **CLOSE)


def test_the_step_size_where_its_rule_has_no_value():
    one, none, infinite = [doubles(1.0)], [doubles(0.0)], [doubles(math.inf)]
    assert oasis_step_size(none, none, one, eta=0.1, theta=math.inf) == 0.1
    assert oasis_step_size(none, none, one, eta=0.1, theta=1.0) == 0.1
    assert oasis_step_size(one, none, one, eta=0.1, theta=math.inf) == 0.1
    assert oasis_step_size(one, none, one, eta=0.1, theta=3.0) == pytest.approx(0.2)
    assert oasis_step_size(one, infinite, one, eta=0.1, theta=1.0) == 0.1


def test_it_survives_a_linear_loss_and_a_minimum():
    for loss in (lambda x: 3 * x.sum(), lambda x: (x**2).sum() * 0):
        x = parameter(1.0, 2.0)
        optimizer = OASIS([x], warm_up=2)
        for _ in range(4):
            optimizer.step(Closure(lambda x=x, loss=loss: loss(x), [x]))
        assert x.isfinite().all()


def test_the_first_scaling_is_the_mean_of_the_warm_up():
    torch.manual_seed(0)
    matrix = torch.randn(5, 5, dtype=torch.float64)
    matrix = matrix @ matrix.T
    x = parameter(1.0, 2.0, 3.0, 4.0, 5.0)
    optimizer = OASIS([x], lr=1e-9, warm_up=7, beta2=0.9)
    torch.manual_seed(5)
    for _ in range(2):
        optimizer.step(Closure(lambda: x @ matrix @ x / 2, [x]))
    torch.manual_seed(5)
    draws = [u * (matrix @ u) for (u,) in (draw_directions([x], "rademacher") for _ in range(8))]
    expected = 0.9 * torch.stack(draws[:7]).mean(0) + 0.1 * draws[7]
    torch.testing.assert_close(optimizer.state[x]["curvature"], expected, **CLOSE)


def test_what_it_evaluates():
    def spent(**options):
        x = parameter(1.0, 2.0)
        optimizer, counts = OASIS([x], warm_up=5, **options), []
        for _ in range(3):
            closure = Closure(lambda: (x**4).sum(), [x])
            optimizer.step(closure)
            counts.append(closure.evaluations)
        return counts

    assert spent() == [1 + 5, 3, 3]
    assert spent(adaptive=False, lr=1e-3) == [1 + 5, 2, 2]


def test_a_late_parameter_has_a_warm_up_of_its_own():
    early, late = parameter(1.0), parameter(1.0)
    optimizer = OASIS([early, late], beta2=0.99, alpha=1e-6, warm_up=3)
    optimizer.step(Closure(lambda: (early**2).sum() / 2, [early, late]))
    assert "curvature" not in optimizer.state.get(late, {})
    optimizer.step(Closure(lambda: (early**2 + 50 * late**2).sum() / 2, [early, late]))
    assert optimizer.state[late]["curvature"].item() == pytest.approx(50.0)
    assert optimizer.state[early]["curvature"].item() == pytest.approx(1.0)


def test_accumulation_is_the_same_as_one_batch():
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, dtype=torch.float64)
    ends = []
    for batches in ([inputs], list(inputs.split(2))):
        torch.manual_seed(1)
        w = parameter(1.0, 2.0, 3.0)
        optimizer = OASIS([w], warm_up=3)
        for _ in range(5):
            optimizer.step(Closure(lambda batch, w=w: ((batch @ w) ** 4).mean(), [w], *batches))
        ends.append(w.detach())
    torch.testing.assert_close(*ends, **CLOSE)


def test_a_fixed_learning_rate_and_momentum_by_hand():
    x, curvature = parameter(1.0, 1.0), doubles(2.0, 8.0)
    optimizer = OASIS([x], lr=0.1, adaptive=False, beta1=0.5, warm_up=1)
    m, expected = doubles(0.0, 0.0), doubles(1.0, 1.0)
    for t in range(3):
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (t + 1)
        optimizer.step(Closure(lambda: (curvature * x**2).sum() / 2, [x]))
        m = 0.5 * m + 0.5 * curvature * expected
        expected = expected - lr * m / curvature
        torch.testing.assert_close(x.detach(), expected, **CLOSE)


def test_a_schedule_governs_the_fixed_kind_alone():
    fixed = traits_of(OASIS, {"adaptive": False})
    assert traits_of(OASIS, {"lr": 0.1}).sets_step_size
    assert not fixed.sets_step_size
    assert (fixed.state, fixed.extra_evaluations) == (1, 1)
    assert traits_of(OASIS, {"beta1": 0.9}).state == 3


VARIANTS = [{"adaptive": False, "lr": 0.05}, {"beta1": 0.5}]
CHECKED = {
    "lowers_rosenbrock",
    "keeps_state_in_parameter_dtype",
    "resumes_exactly",
    "takes_missing_gradients",
    "takes_an_empty_group",
    "takes_groups_with_own_lr",
    "follows_a_scheduler",
}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("check", [check for check in CHECKS if name_of(check) in CHECKED], ids=name_of)
def test_the_variants_conform(check, options):
    outcome = examine(check, OASIS, {"warm_up": 2, **options})
    assert outcome.state != "failed", outcome.reason


@pytest.mark.parametrize("options", [{}, *VARIANTS], ids=str)
def test_the_state_of_the_variants(options):
    x = parameter(1.0, 2.0)
    optimizer = OASIS([x], warm_up=2, **options)
    for _ in range(2):
        optimizer.step(Closure(lambda: (x**4).sum(), [x]))
    assert len(optimizer.state[x]) == traits_of(OASIS, options).state


def test_a_plain_closure_is_refused_before_anything_moves():
    x = parameter(1.0)
    for closure in (None, lambda: torch.zeros(())):
        with pytest.raises(ClosureError, match="OASIS"):
            OASIS([x]).step(closure)
    x.grad, other = doubles(1.0), parameter(1.0)
    closure = Closure(lambda: (other**2).sum(), [other])
    with pytest.raises(ClosureError, match="does not know"):
        OASIS([x]).step(closure)
    assert x.item() == 1.0


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": -1.0, "adaptive": False}, {"beta2": 1.0}, {"beta1": -0.1}, {"alpha": 0.0}, {"warm_up": 0}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        OASIS([parameter(1.0)], **options)
