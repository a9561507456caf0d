"""PSPS and its kinds with slack: steps by hand, and the small problems that they solve."""

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
from lightrail_optimizers import PSPS, PSPSL1, PSPSL2
from lightrail_optimizers.closure_answers import gradients, inner
from lightrail_optimizers.psps_rule import polyak, polyak_l1, polyak_l2

CLOSE = {"rtol": 0, "atol": 1e-9}
ALL = [PSPS, PSPSL1, PSPSL2]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


# The step of PSPS.


def test_the_polyak_step_by_hand():
    x = parameter(0.0, 0.0)
    optimizer = PSPS([x], "none")
    optimizer.step(Closure(lambda: 2 + 3 * x[0] + 4 * x[1], [x]))
    assert optimizer.logged() == {"step_size": pytest.approx(0.08, abs=1e-12)}
    torch.testing.assert_close(x.detach(), doubles(-0.24, -0.32), **CLOSE)


def test_the_preconditioned_step_by_hand():
    x = parameter(0.0, 0.0)
    optimizer = PSPS([x], "hutchinson", warm_up=1)
    optimizer.step(Closure(lambda: 2 + 3 * x[0] + 4 * x[1] + x[0] ** 2 / 2 + 2 * x[1] ** 2, [x]))
    assert optimizer.logged() == {"step_size": pytest.approx(2 / 13, abs=1e-12)}
    torch.testing.assert_close(x.detach(), doubles(-6 / 13, -2 / 13), **CLOSE)


@pytest.mark.parametrize("preconditioner", ["adam", "adagrad", "hutchinson", "none"])
def test_the_linear_model_meets_its_bound(preconditioner):
    torch.manual_seed(0)
    w, v = parameter(1.0, -2.0, 0.5), parameter(0.3)
    inputs = torch.randn(6, 3, dtype=torch.float64)
    optimizer = PSPS([{"params": [w]}, {"params": [v]}], preconditioner, f_star=-0.3, eta_max=None, warm_up=3)
    for _ in range(4):
        before = [w.detach().clone(), v.detach().clone()]
        f = optimizer.step(Closure(lambda: ((inputs @ w - v) ** 4).mean(), [w, v]))
        moved = [p.detach() - b for p, b in zip((w, v), before, strict=True)]
        slope = inner(gradients([w, v]), moved)
        assert (f + slope).item() == pytest.approx(-0.3, abs=1e-9)


def test_bounds_of_the_step():
    assert polyak(2.0, 25.0, eta_max=0.05) == 0.05
    assert polyak(-1.0, 25.0, eta_max=0.05) == 0.0
    assert polyak(2.0, 0.0, eta_max=math.inf) == 0.0
    x = parameter(1.0)
    PSPS([x], f_star=3.0).step(Closure(lambda: (x**2).sum(), [x]))
    assert x.item() == 1.0


def test_a_gradient_of_zero_moves_nothing():
    for make in ALL:
        x = parameter(1.0, 2.0)
        make([x]).step(Closure(lambda x=x: 5 + (x * 0).sum(), [x]))
        assert x.tolist() == [1.0, 2.0]


# Preconditioners.


def scales(preconditioner, gradients, **options):
    """B, read off the steps of a loss that is 1 everywhere the method looks."""
    x = parameter(0.0, 0.0)
    optimizer, found = PSPS([x], preconditioner, eta_max=None, **options), []
    for g in gradients:
        before = x.detach().clone()
        optimizer.step(Closure(lambda g=g, before=before: 1 + (g * (x - before)).sum(), [x]))
        found.append(-optimizer.logged()["step_size"] * g / (x.detach() - before))
    return found


GRADIENTS = [doubles(1.0, -4.0), doubles(0.5, 2.0), doubles(-3.0, 0.1)]


def test_the_scale_of_adam():
    v = 0.0
    for t, (g, found) in enumerate(zip(GRADIENTS, scales("adam", GRADIENTS, beta2=0.9, eps=0.1), strict=True), 1):
        v = 0.9 * v + 0.1 * g**2
        torch.testing.assert_close(found, (v / (1 - 0.9**t)).sqrt() + 0.1, **CLOSE)


def test_the_scale_of_adagrad():
    total = 0.0
    for g, found in zip(GRADIENTS, scales("adagrad", GRADIENTS, eps=0.1), strict=True):
        total = total + g**2
        torch.testing.assert_close(found, total.sqrt() + 0.1, **CLOSE)


def test_the_scale_of_hutchinson_is_the_magnitude_of_the_average():
    x = parameter(1.0, 1.0)
    optimizer = PSPS([x], "hutchinson", beta2=0.5, alpha=0.1, warm_up=1, eta_max=1e-3)
    for curvature, moves in ((doubles(2.0, 2.0), doubles(-1.0, -1.0)), (doubles(-8.0, -2.0), doubles(8 / 3, 20.0))):
        before = x.detach().clone()
        optimizer.step(Closure(lambda c=curvature: 20 + (c * x**2).sum() / 2, [x]))
        torch.testing.assert_close((x.detach() - before) / 1e-3, moves * before, **CLOSE)
    torch.testing.assert_close(optimizer.state[x]["curvature"], doubles(-3.0, 0.0), **CLOSE)


def test_groups_may_differ_in_their_preconditioner():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = PSPS([{"params": [a], "preconditioner": "none"}, {"params": [b], "preconditioner": "hutchinson"}])
    optimizer.step(Closure(lambda: (a**2 + 2 * b**2).sum() / 2, [a, b]))
    tau = 1.5 / (1 + 4 / 2)
    torch.testing.assert_close(torch.cat([a, b]).detach(), doubles(1 - tau, 1 - tau), **CLOSE)


# Slack.


def numerically(f, g, b, s, price, mu):
    """The move and the slack of the problem, by a general solver."""
    minimize = pytest.importorskip("scipy.optimize").minimize

    def objective(z):
        return (b * z[:-1] ** 2).sum() / 2 + mu / 2 * (z[-1] - s) ** 2 + price(z[-1])

    constraints = [{"type": "ineq", "fun": lambda z: z[-1] - f - g @ z[:-1]}]
    start = np.append(np.zeros(len(g)), max(f, s))
    bounds = [(None, None)] * len(g) + [(0, None)]
    answer = minimize(
        objective,
        start,
        method="SLSQP",
        bounds=bounds,
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return answer.x[:-1], answer.x[-1], objective


@pytest.mark.parametrize(("rule", "power"), [(polyak_l1, 1), (polyak_l2, 2)])
def test_the_slack_solves_its_problem(rule, power):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        f, s = rng.choice([rng.uniform(0, 3), -0.5]), rng.choice([0.0, rng.uniform(0, 4)])
        lam, mu = rng.uniform(0.01, 2), rng.uniform(0.1, 3)
        g, b = rng.normal(size=3), rng.uniform(0.2, 5, size=3)
        n = (g**2 / b).sum()
        tau, slack = rule(f, n, s, lam=lam, mu=mu)
        move, expected, objective = numerically(f, g, b, s, lambda z, lam=lam: lam * z**power / power, mu)
        np.testing.assert_allclose(np.append(-tau * g / b, slack), np.append(move, expected), rtol=0, atol=2e-5)
        assert f - tau * n <= slack + 1e-12  # the constraint holds
        ours = objective(np.append(-tau * g / b, slack))
        assert ours <= objective(np.append(move, expected)) + 1e-9
        kinds.add((tau > 0, slack > 0, f > 0))
    assert len(kinds) >= (4 if power == 1 else 3)


def test_the_first_order_conditions_of_the_slack_hold_exactly():
    f, n, s, lam, mu = 2.0, 1.7, 0.4, 0.3, 0.8
    tau, slack = polyak_l1(f, n, s, lam=lam, mu=mu)
    assert f - tau * n == pytest.approx(slack, abs=1e-12)
    assert mu * (slack - s) + lam == pytest.approx(tau, abs=1e-12)
    tau, slack = polyak_l2(f, n, s, lam=lam, mu=mu)
    assert f - tau * n == pytest.approx(slack, abs=1e-12)
    assert mu * (slack - s) + lam * slack == pytest.approx(tau, abs=1e-12)


def test_slack_with_an_inertia_of_one_by_hand():
    f, n, s, lam = 2.0, 3.0, 0.5, 0.1
    tau = (f - s + lam) / (1 + n)
    assert polyak_l1(f, n, s, lam=lam, mu=1.0) == (pytest.approx(tau), pytest.approx(s - lam + tau))
    assert polyak_l1(f, n, 0.0, lam=9.0, mu=1.0) == (pytest.approx(f / n), 0.0)


def test_where_the_gradient_is_zero_the_slack_takes_the_whole_loss():
    for rule in (polyak_l1, polyak_l2):
        assert rule(2.0, 0.0, 0.5, lam=0.1, mu=1.0)[1] == pytest.approx(2.0, abs=1e-12)


def test_slack_of_the_unpreconditioned_paper():
    """Gower et al., 2022: ``(1-l)/2 (||Δ||² + (s' - s)²)`` and a price of ``l s'²/2`` or ``l s'/2``."""
    f, n, s, weight = 2.0, 3.0, 0.5, 0.2
    gamma = (f - (1 - weight) * s) / (1 - weight + n)
    tau, slack = polyak_l2(f, n, s, lam=weight / (1 - weight), mu=1.0)
    assert (tau, slack) == (pytest.approx(gamma), pytest.approx((1 - weight) * (s + gamma)))
    price = weight / (2 * (1 - weight))
    gamma = (f - s + price) / (1 + n)
    assert polyak_l1(f, n, s, lam=price, mu=1.0) == (pytest.approx(gamma), pytest.approx(s - price + gamma))


@pytest.mark.parametrize("make", [PSPSL1, PSPSL2])
def test_a_price_without_bound_leaves_the_polyak_step(make):
    ends = []
    for optimizer_of in (lambda p: PSPS(p, eta_max=None), lambda p: make(p, lam=1e12)):
        w = parameter(1.0, -2.0)
        optimizer = optimizer_of([w])
        for _ in range(5):
            optimizer.step(Closure(lambda w=w: (doubles(1.0, 7.0) * w**2).sum(), [w]))
        ends.append(w.detach())
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize(("make", "rule"), [(PSPSL1, polyak_l1), (PSPSL2, polyak_l2)])
def test_the_slack_is_remembered_and_travels(make, rule):
    x, s = parameter(1.0), 0.0
    optimizer = make([x], lam=0.2, mu=0.5, preconditioner="none", f_star=0.1)
    for offset in (1.0, 3.0, 0.5, 2.0):
        point = x.item()
        tau, s = rule(offset + point**2 - 0.1, 4 * point**2, s, lam=0.2, mu=0.5)
        optimizer.step(Closure(lambda offset=offset: offset + (x**2).sum(), [x]))
        assert x.item() == pytest.approx(point - tau * 2 * point, abs=1e-9)
        assert optimizer.logged() == {"step_size": pytest.approx(tau, abs=1e-12), "slack": pytest.approx(s, abs=1e-12)}
        loaded = make([x], lam=0.2, mu=0.5, preconditioner="none", f_star=0.1)
        loaded.load_state_dict(optimizer.state_dict())
        optimizer = loaded


# Company.


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("preconditioner", ["adam", "hutchinson"])
def test_accumulation_is_the_same_as_one_batch(make, preconditioner):
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, dtype=torch.float64)
    ends = []
    for batches in ([inputs], list(inputs.split(2))):
        torch.manual_seed(1)
        w = parameter(1.0, 2.0, 3.0)
        optimizer = make([w], preconditioner=preconditioner, warm_up=2)
        for _ in range(4):
            optimizer.step(Closure(lambda batch, w=w: ((batch @ w) ** 2).mean(), [w], *batches))
        ends.append(w.detach())
    torch.testing.assert_close(*ends, **CLOSE)


def test_which_closure_it_takes():
    x = parameter(1.0)

    def plain():
        x.grad = 2 * x.detach()
        return (x.detach() ** 2).sum()

    for make in ALL:
        with pytest.raises(ClosureError, match=make.__name__):
            make([x]).step()
        with pytest.raises(ClosureError, match=make.__name__):
            make([x], preconditioner="hutchinson").step(plain)
    assert x.item() == 1.0
    PSPS([x], "none").step(plain)
    assert x.item() == 0.5


def test_its_needs_follow_from_the_preconditioner():
    for make in ALL:
        assert not traits_of(make, {"preconditioner": "adagrad"}).needs_second_derivatives
        assert traits_of(make, {"preconditioner": "none"}).state == 0
        hutchinson = traits_of(make, {"preconditioner": "hutchinson"})
        assert (hutchinson.needs_second_derivatives, hutchinson.is_stochastic) == (True, True)
        assert hutchinson.rule == make.traits.rule != ""
        x = parameter(1.0)
        optimizer, counts = make([x], preconditioner="hutchinson", warm_up=4), []
        for _ in range(2):
            closure = Closure(lambda x=x: (x**2).sum(), [x])
            optimizer.step(closure)
            counts.append(closure.evaluations)
        assert counts == [1 + 4, 2]
        assert hutchinson.extra_evaluations == 1


CHECKED = {
    "lowers_rosenbrock",
    "keeps_state_in_parameter_dtype",
    "resumes_exactly",
    "takes_missing_gradients",
    "takes_an_empty_group",
    "follows_a_scheduler",
}


@pytest.mark.parametrize("preconditioner", ["hutchinson", "adagrad", "none"])
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("check", [check for check in CHECKS if name_of(check) in CHECKED], ids=name_of)
def test_the_other_preconditioners_conform(check, make, preconditioner):
    outcome = examine(check, make, {"preconditioner": preconditioner, "warm_up": 2})
    assert outcome.state != "failed", outcome.reason


@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner": "newton"},
        {"f_star": math.inf},
        {"eta_max": 0.0},
        {"beta2": 1.0},
        {"eps": 0.0},
        {"alpha": 0.0},
        {"warm_up": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        PSPS([parameter(1.0)], **options)


@pytest.mark.parametrize("options", [{"lam": -0.1}, {"mu": 0.0}], ids=str)
def test_slack_out_of_range_is_refused(options):
    for make in (PSPSL1, PSPSL2):
        with pytest.raises(ConfigurationError):
            make([parameter(1.0)], **options)
