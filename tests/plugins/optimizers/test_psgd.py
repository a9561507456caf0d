"""PSGD as an optimizer: its update, momentum, groups and state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_optimizers import PSGDLRA, PSGDDiag, PSGDXMat, psgd_lra
from lightrail_optimizers.psgd_diag import fit_diag
from lightrail_optimizers.psgd_xmat import fit_xmat, precondition_xmat
from lightrail_optimizers.sophia_rule import draw_directions

CLOSE = {"rtol": 0, "atol": 1e-9}
KINDS = (PSGDXMat, PSGDLRA, PSGDDiag)
CURVATURE = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


def quadratic(w, curvature=CURVATURE):
    return Closure(lambda: (curvature * w**2).sum() / 2, [w])


# The update.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", [PSGDXMat, PSGDDiag])
def test_an_identity_that_is_never_fitted_is_sgd_on_the_average_of_the_gradient(kind, momentum):
    w, x, m = parameter(1.0, -2.0, 3.0), doubles(1.0, -2.0, 3.0), doubles(0.0, 0.0, 0.0)
    optimizer = kind([w], lr=0.1, momentum=momentum, update_probability=0.0, initial_scale=1.0)
    for t in range(4):
        w.grad = torch.cos(doubles(t, t + 1, t + 2))
        optimizer.step()
        m = momentum * m + (1 - momentum) * w.grad  # from zero, without a correction
        x = x - 0.1 * m
        torch.testing.assert_close(w.detach(), x, **CLOSE)


def test_a_low_rank_identity_that_is_never_fitted_is_nearly_sgd_and_sgd_without_its_noise():
    torch.manual_seed(0)
    w, g = nn.Parameter(torch.zeros(400)), torch.linspace(-1, 1, 400)
    optimizer = PSGDLRA([w], lr=1.0, update_probability=0.0, initial_scale=1.0)
    w.grad = g.clone()
    optimizer.step()
    assert 0 < (w + g).norm() / g.norm() < 0.2
    optimizer.state[w]["U"].zero_()
    w.data.zero_()
    optimizer.step()
    torch.testing.assert_close(w.detach(), -g)


def test_three_steps_of_xmat_by_hand():
    w, x = parameter(1.0, -2.0, 3.0), doubles(1.0, -2.0, 3.0)
    optimizer = PSGDXMat([w], lr=0.1, momentum=0.5, preconditioner_lr=0.3)
    a, b, m = None, torch.zeros(3, dtype=torch.float64), 0.0
    for t in range(3):
        torch.manual_seed(t)
        optimizer.step(quadratic(w))
        torch.manual_seed(t)
        v = draw_directions([x], "gaussian")[0]
        h, g = CURVATURE * v, CURVATURE * x
        if a is None:
            a = torch.full_like(x, float((v**2).mean() ** 0.25 * (h**4).mean() ** -0.125))
        fit_xmat(a, b, v, h, step=0.3)
        m = 0.5 * m + 0.5 * g
        x = x - 0.1 * precondition_xmat(a, b, m)
        torch.testing.assert_close(w.detach(), x, **CLOSE)
        torch.testing.assert_close(optimizer.state[w]["b"], b, **CLOSE)


@pytest.mark.parametrize(("normalizer", "step"), [("second", 0.1), ("first", 0.01)])
def test_the_step_of_q_has_a_default_for_each_normalizer(normalizer, step):
    w, expected = parameter(1.0, 1.0, 1.0), torch.ones(3, dtype=torch.float64)
    torch.manual_seed(0)
    PSGDDiag([w], normalizer=normalizer, initial_scale=1.0).step(quadratic(w))
    torch.manual_seed(0)
    v = draw_directions([expected], "gaussian")[0]
    fit_diag(expected, v, CURVATURE * v, step=step, normalizer=normalizer)
    torch.testing.assert_close(w.detach(), 1 - 0.01 * expected**2 * CURVATURE, **CLOSE)


def test_a_long_update_is_shortened_after_it_was_preconditioned():
    w = parameter(0.0, 0.0)
    optimizer = PSGDDiag([w], lr=1.0, update_probability=0.0, initial_scale=2.0, max_norm=5.0)
    for g, expected in ((doubles(3.0, 4.0), doubles(-3.0, -4.0)), (doubles(0.3, 0.4), doubles(-1.2, -1.6))):
        w.data.zero_()
        w.grad = g
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_far_fewer_steps_than_sgd_across_curvatures(kind):
    torch.manual_seed(0)
    curvature = torch.logspace(0, 3, 10, dtype=torch.float64)
    w, u = nn.Parameter(torch.ones(10).double()), nn.Parameter(torch.ones(10).double())
    ours, sgd = kind([w], lr=0.5, preconditioner_lr=0.5), torch.optim.SGD([u], lr=1.9e-3)
    for _ in range(150):
        ours.step(quadratic(w, curvature))
        sgd.zero_grad()
        (curvature * u**2).sum().div(2).backward()
        sgd.step()
    assert (curvature * w**2).sum() < 1e-4
    assert (curvature * u**2).sum() > 0.5


# Low rank.


def test_u_and_v_begin_as_noise_of_the_stated_variance():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(2000))
    w.grad = torch.ones(2000)
    optimizer = PSGDLRA([w], rank=5, update_probability=0.0, initial_scale=3.0)
    optimizer.step()
    kept = optimizer.state[w]
    assert kept["U"].shape == kept["V"].shape == (5, 2000)
    assert not torch.equal(kept["U"], kept["V"])
    for factor in (kept["U"], kept["V"]):
        assert float(factor.std()) == pytest.approx((2000 * 15) ** -0.5, rel=0.05)
    assert torch.equal(kept["d"], torch.full((2000,), 3.0))


def test_u_or_v_moves_with_probability_a_half_and_one_fit_in_a_hundred_balances(monkeypatch):
    turns, balanced = [], []
    monkeypatch.setattr(psgd_lra, "fit_lra", lambda *args, moves_u, **options: turns.append(moves_u))
    monkeypatch.setattr(psgd_lra, "balance_lra", lambda *args: balanced.append(args))
    torch.manual_seed(0)
    w = parameter(1.0)
    optimizer = PSGDLRA([w], lr=0.0, rank=1, hvp="whitening")
    w.grad = doubles(1.0)
    for _ in range(2000):
        optimizer.step()
    assert len(turns) == 2000
    assert 0.45 < sum(turns) / 2000 < 0.55
    assert 8 < len(balanced) < 34


# Groups and state.


def test_each_group_has_its_own_q_options_and_pairs():
    torch.manual_seed(0)
    a, b, c = parameter(1.0, 1.0), parameter(1.0), parameter(1.0)
    groups = [{"params": [a]}, {"params": []}, {"params": [b], "hvp": "finite_difference"}]
    optimizer = PSGDDiag([*groups, {"params": [c], "hvp": "whitening", "lr": 0.0}], lr=0.1, preconditioner_lr=0.5)
    for _ in range(40):
        closure = Closure(lambda: (2 * a**2).sum() + (8 * b**2).sum() + (c**2).sum(), [c, b, a])
        optimizer.step(closure)
        assert closure.evaluations == 3
    torch.testing.assert_close(optimizer.state[a]["d"] ** 2, doubles(0.25, 0.25), rtol=1e-3, atol=0)
    torch.testing.assert_close(optimizer.state[b]["d"] ** 2, doubles(1 / 16), rtol=1e-3, atol=0)
    assert c.item() == 1.0
    assert max(a.abs().max(), b.abs().max()) < 0.1


def test_they_are_optimizers_of_torch_with_a_state_that_travels():
    for kind, names in ((PSGDXMat, {"a", "b"}), (PSGDLRA, {"U", "V", "d"}), (PSGDDiag, {"d"})):
        torch.manual_seed(0)
        w = parameter(1.0, -2.0, 0.5)
        optimizer = kind([w], lr=0.1, momentum=0.5)
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.step(quadratic(w))
        assert set(optimizer.state[w]) == {*names, "momentum"}
        twin = nn.Parameter(w.detach().clone())
        other = kind([twin], lr=0.1, momentum=0.5)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for x, each in ((w, optimizer), (twin, other)):
            torch.manual_seed(1)
            each.step(quadratic(x))
        assert torch.equal(w, twin)


def test_half_precision_calculates_in_single_and_keeps_half():
    torch.manual_seed(0)
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    seen = []
    optimizer = PSGDXMat([w], lr=0.1)
    fit = optimizer._fit
    optimizer._fit = lambda group, q, v, h: (seen.append(v.dtype), fit(group, q, v, h))  # type: ignore[method-assign]
    for _ in range(50):
        optimizer.step(Closure(lambda: (CURVATURE.bfloat16() * w**2).sum() / 2, [w]))
    assert set(seen) == {torch.float32}
    assert {tensor.dtype for tensor in optimizer.state[w].values()} == {torch.bfloat16}
    assert w.abs().max() < 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"momentum": 1.0},
        {"preconditioner_lr": 0.0},
        {"preconditioner_lr": 1.5},
        {"update_probability": 1.1},
        {"initial_scale": 0.0},
        {"max_norm": -1.0},
        {"hvp": "exactly"},
        {"normalizer": "third"},
        {"rank": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        PSGDLRA([parameter(1.0)], **options)
