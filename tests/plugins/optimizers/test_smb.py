"""SMB: the model by hand and by its formula, the test that decides, and what several groups mean for it."""

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
from lightrail_optimizers import SMB
from lightrail_optimizers.smb import model_coefficients, model_steps

CLOSE = {"rtol": 0, "atol": 1e-9}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


def by_the_formula(s, y, g, trial_g, omega=0.99):
    """The published equations as they stand."""
    norm = np.linalg.norm
    sigma = 0.5 * (norm(s) * (norm(y) + norm(trial_g) / omega) - y @ s)
    theta = (y @ s + 2 * sigma) ** 2 - (s @ s) * (y @ y)
    c_g = -(s @ s) / (2 * sigma)
    c_s = c_g / theta * (-(y @ s + 2 * sigma) * (y @ g) + (y @ y) * (s @ g))
    c_y = c_g / theta * (-(y @ s + 2 * sigma) * (s @ g) + (s @ s) * (y @ g))
    return sigma, theta, c_s * s + c_g * g + c_y * y


# The model.


def test_the_model_by_hand():
    s, y, g = np.array([-3.0]), np.array([-9.0]), np.array([3.0])
    sigma, theta, step = by_the_formula(s, y, g, g)
    assert sigma == pytest.approx(4.5454545455, abs=1e-9)
    assert theta == pytest.approx(573.5537190083, abs=1e-9)
    assert step[0] == pytest.approx(-0.4279538905, abs=1e-9)
    x = parameter(1.0)
    optimizer = SMB([x], lr=1.0)
    optimizer.step(Closure(lambda: (1.5 * x**2).sum(), [x]))
    assert x.item() == pytest.approx(1 + step[0], abs=1e-12)
    assert x.item() == pytest.approx(0.5720461095, abs=1e-9)
    assert optimizer.logged() == {"model_step": 1.0}


def test_the_model_by_its_formula():
    rng = np.random.default_rng(0)
    for omega in (0.5, 0.99):
        s, y, g, trial_g = ([rng.normal(size=(3, 2)) * scale for scale in (1.0, 1e-3)] for _ in range(4))
        as_tensors = ([torch.from_numpy(each) for each in one] for one in (s, y, g, trial_g))
        for i, step in enumerate(model_steps(*as_tensors, omega=omega)):
            *_, expected = by_the_formula(s[i].ravel(), y[i].ravel(), g[i].ravel(), trial_g[i].ravel(), omega)
            np.testing.assert_allclose(step.numpy().ravel(), expected, rtol=1e-9, atol=0)


def test_without_a_model_a_tensor_stays():
    assert model_coefficients(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, omega=0.99) == (0.0, 0.0, 0.0)
    assert model_coefficients(1.0, math.inf, 1.0, math.nan, math.nan, 1.0, omega=0.99) == (0.0, 0.0, 0.0)
    still, x = parameter(2.0), parameter(1.0)
    SMB([still, x]).step(Closure(lambda: (1.5 * x**2).sum() + (still * 0).sum(), [still, x]))
    assert still.item() == 2.0
    assert x.item() == pytest.approx(0.5720461095, abs=1e-9)


def test_a_gradient_that_does_not_change_is_followed():
    """y = 0: the model is linear, and its step is the trial shortened by omega."""
    g = doubles(3.0, 4.0)
    (step,) = model_steps([-0.1 * g], [g * 0], [g], [g], omega=0.9)
    torch.testing.assert_close(step, -0.1 * 0.9 * g, **CLOSE)


def test_every_tensor_has_a_model_of_its_own():
    curvatures = (3.0, 40.0)
    together = [parameter(1.0), parameter(1.0, -2.0)]
    one, other = together
    SMB(together).step(
        Closure(lambda: (curvatures[0] * (one**2).sum() + curvatures[1] * (other**2).sum()) / 2, together)
    )
    for c, x, start in zip(curvatures, together, (doubles(1.0), doubles(1.0, -2.0)), strict=True):
        g = (c * start).numpy()
        *_, step = by_the_formula(-g, -c * g, g, g)
        np.testing.assert_allclose(x.detach().numpy(), start.numpy() + step, rtol=0, atol=1e-9)


# The test.


def test_a_trial_that_passes_is_gradient_descent():
    w, v = parameter(1.0, -2.0), parameter(1.0, -2.0)
    ours, plain = SMB([w], lr=0.01), torch.optim.SGD([v], lr=0.01)
    for _ in range(5):
        ours.step(Closure(lambda: (w**4).sum(), [w]))
        plain.step(Closure(lambda: (v**4).sum(), [v]))
        assert ours.logged() == {"model_step": 0.0}
    assert torch.equal(w, v)


@pytest.mark.parametrize(("c", "passes"), [(0.499, True), (0.501, False)])
def test_the_decrease_that_is_asked_for(c, passes):
    """On x²/2 the trial of length 1 brings exactly half of what the gradient promises."""
    x = parameter(1.0)
    optimizer = SMB([x], lr=1.0, c=c)
    optimizer.step(Closure(lambda: (x**2).sum() / 2, [x]))
    assert optimizer.logged() == {"model_step": float(not passes)}


def test_groups_are_tried_at_once():
    """The first group's trial would pass by itself, and the second's would not; together they do not."""
    ends = []
    for groups_of in (lambda a, b: [a, b], lambda a, b: [{"params": [a]}, {"params": [b]}]):
        a, b = parameter(1.0), parameter(1.0)
        optimizer = SMB(groups_of(a, b), lr=0.6, c=0.3)
        optimizer.step(Closure(lambda a=a, b=b: (a**2 + 3 * b**2).sum() / 2, [a, b]))
        assert optimizer.logged() == {"model_step": 1.0}
        ends.append(torch.cat([a, b]).detach())
    assert torch.equal(*ends)
    assert ends[0][0] != pytest.approx(0.4)


def test_groups_promise_with_their_own_learning_rates():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = SMB([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], c=0.1)
    optimizer.step(Closure(lambda: (a + 3 * b).sum(), [a, b]))
    assert (a.item(), b.item()) == (pytest.approx(0.9), pytest.approx(1.4))
    assert optimizer._promised([(g, g["params"]) for g in optimizer.param_groups]) == pytest.approx(0.1 * 1.9)


def test_what_it_evaluates():
    def spent(lr, **options):
        x = parameter(1.0)
        optimizer, counts = SMB([x], lr=lr, **options), []
        for _ in range(3):
            closure = Closure(lambda: (x**2).sum() / 2, [x])
            optimizer.step(closure)
            counts.append(closure.evaluations)
        return counts

    assert spent(0.1) == [2, 2, 2]
    assert spent(3.0) == [3, 3, 3]
    assert spent(3.0, independent=True) == [2, 2, 2]


def test_it_takes_learning_rates_at_which_gradient_descent_diverges():
    curvature = doubles(1.0, 10.0, 30.0)

    def end(make):
        x = parameter(1.0, 1.0, 1.0)
        optimizer = make([x])
        for _ in range(100):
            optimizer.step(Closure(lambda: (curvature * x**2).sum() / 2, [x]))
        return (curvature * x.detach() ** 2).sum().item() / 2

    for lr in (0.1, 0.3, 0.5):
        assert end(lambda p, lr=lr: SMB(p, lr)) < 1e-4
        assert end(lambda p, lr=lr: torch.optim.SGD(p, lr)) > 1e4


# SMBi.


def test_the_independent_kind_in_numpy_terms():
    """A failed trial moves nothing; the next batch makes the model for the gradient of the batch that failed."""
    rng = np.random.default_rng(0)
    w, x, lr = parameter(1.0, -2.0), np.array([1.0, -2.0]), 0.6
    optimizer, owed, kinds = SMB([w], lr=lr, independent=True), None, []
    for c, b in [(rng.uniform(0.5, 4.0, size=2), rng.normal(size=2)) for _ in range(12)]:

        def value(x, c=c, b=b):
            return (c * x**2).sum() / 2 + (b * x).sum()

        g = c * x + b
        s = -lr * g
        if owed is not None:
            *_, step = by_the_formula(s, c * s, owed, g)
            x, owed = x + step, None
            kinds.append("model")
        elif value(x + s) <= value(x) - 0.1 * lr * g @ g:
            x = x + s
            kinds.append("passed")
        else:
            owed = g
            kinds.append("failed")
        c, b = torch.from_numpy(c), torch.from_numpy(b)
        optimizer.step(Closure(lambda c=c, b=b: (c * w**2).sum() / 2 + (b * w).sum(), [w]))
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=0, atol=1e-9)
        assert optimizer.logged() == {"model_step": float(kinds[-1] == "model")}
    assert set(kinds) == {"model", "passed", "failed"}


def test_only_the_independent_kind_keeps_anything():
    for options, state in (({}, 0), ({"independent": True}, 1)):
        x = parameter(1.0, 2.0)
        optimizer = SMB([x], lr=3.0, **options)
        optimizer.step(Closure(lambda x=x: (x**2).sum(), [x]))
        assert len(optimizer.state[x]) == traits_of(SMB, options).state == state


def test_a_debt_is_paid_after_a_checkpoint():
    def run(break_after=None):
        torch.manual_seed(0)
        x = parameter(1.0, -2.0)
        optimizer = SMB([x], lr=1.0, independent=True)
        for t in range(6):
            optimizer.step(Closure(lambda t=t: ((t + 1) * x**2).sum(), [x]))
            if t == break_after:
                assert optimizer.param_groups[0]["owed"]
                loaded = SMB([x], lr=1.0, independent=True)
                loaded.load_state_dict(optimizer.state_dict())
                optimizer = loaded
        return x.detach()

    assert torch.equal(run(), run(break_after=0))


# The length of the trial.


def stretches(lr, steps, **options):
    x = parameter(1.0)
    optimizer, found = SMB([x], lr=lr, adapt_every=3, **options), []
    for _ in range(steps):
        with torch.no_grad():
            x.fill_(1.0)
        optimizer.step(Closure(lambda: (x**2).sum() / 2, [x]))
        found.append(optimizer.logged().get("trial_stretch", 1.0))
    assert optimizer.param_groups[0]["lr"] == lr
    return found


def test_the_trial_grows_while_it_passes_and_shrinks_while_it_fails():
    assert stretches(0.1, 6) == [1, 1, pytest.approx(1 / 0.9)] + [pytest.approx(1 / 0.9)] * 2 + [pytest.approx(0.9**-2)]
    assert stretches(3.0, 6)[2::3] == [pytest.approx(0.9), pytest.approx(0.81)]
    assert stretches(0.1, 6, lr_max=0.112)[-1] == pytest.approx(1 / 0.9)
    assert stretches(3.0, 3, tolerated=1.0, lr_max=100.0)[-1] == pytest.approx(1 / 0.9)
    # A failure of the independent kind is one model step in two steps.
    assert stretches(3.0, 3, independent=True, tolerated=0.6)[-1] == pytest.approx(0.9)


# Company.

CHECKED = {
    "lowers_a_quadratic",
    "lowers_rosenbrock",
    "keeps_parameter_dtype",
    "keeps_state_in_parameter_dtype",
    "resumes_exactly",
    "takes_noncontiguous_parameters",
    "takes_empty_tensors",
    "takes_missing_gradients",
    "takes_an_empty_group",
}
MOVING = {"takes_missing_gradients"}  # at every step, which the independent kind does not


@pytest.mark.parametrize("options", [{"lr": 3.0}, {"lr": 3.0, "adapt_every": 2}], ids=str)
@pytest.mark.parametrize("check", [check for check in CHECKS if name_of(check) in CHECKED], ids=name_of)
def test_it_conforms_where_trials_fail(check, options):
    outcome = examine(check, SMB, options)
    assert outcome.state != "failed", outcome.reason


@pytest.mark.parametrize("check", [check for check in CHECKS if name_of(check) in CHECKED - MOVING], ids=name_of)
def test_the_independent_kind_conforms(check):
    outcome = examine(check, SMB, {"lr": 3.0, "independent": True})
    assert outcome.state != "failed", outcome.reason


def test_a_plain_closure_is_refused():
    x = parameter(1.0)
    for closure in (None, lambda: torch.zeros(())):
        with pytest.raises(ClosureError, match="SMB"):
            SMB([x]).step(closure)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"c": 1.0},
        {"omega": 1.0},
        {"omega": 0.0},
        {"adapt_every": 0},
        {"adapt_by": 1.0},
        {"tolerated": 1.1},
        {"lr_max": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        SMB([parameter(1.0)], **options)
