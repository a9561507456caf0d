"""Sophia: hand-computed steps and exact estimators."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_optimizers import SophiaG, SophiaH
from lightrail_optimizers.sophia_rule import draw_directions, gauss_newton_bartlett, hutchinson, sophia

CLOSE = {"rtol": 0, "atol": 1e-9}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(doubles(*values))


def gradient_steps(optimizer, w, gradients):
    found = []
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        found.append(w.detach().clone())
    return found


# The update.


def test_without_an_estimate_every_coordinate_moves_by_the_learning_rate():
    w = parameter(1.0, -2.0)
    optimizer = SophiaG([w], lr=0.1, weight_decay=0.1, batch_size=1, form="official", eps=1e-15)
    first, second = gradient_steps(optimizer, w, [doubles(0.5, -1.0), doubles(1.0, 0.25)])
    torch.testing.assert_close(first, doubles(0.89, -1.88), **CLOSE)
    torch.testing.assert_close(second, doubles(0.7811, -1.7612), **CLOSE)


@pytest.mark.parametrize(("form", "eps"), [("paper", 1e-12), ("official", 1e-15)])
def test_an_unclipped_step_by_hand(form, eps):
    x, m = doubles(1.0), doubles(0.0)
    sophia([x], [doubles(0.5)], [m], [doubles(10.0)], lr=0.1, b1=0.965, gamma=0.04, eps=eps, wd=0.1, form=form)
    torch.testing.assert_close(m, doubles(0.0175), **CLOSE)
    torch.testing.assert_close(x, doubles(0.985625), **CLOSE)


def test_two_steps_of_the_whole_method_in_numpy_terms():
    curvature, lr, wd, b1, b2, gamma = doubles(1.0, 50.0), 0.1, 0.1, 0.9, 0.8, 0.5
    w = parameter(1.0, -2.0)
    optimizer = SophiaH([w], lr, (b1, b2), gamma, weight_decay=wd, update_every=2, distribution="rademacher")
    x, m, h = doubles(1.0, -2.0), 0.0, 0.0
    for t in range(1, 5):
        optimizer.step(Closure(lambda: (curvature * w**2).sum() / 2, [w]))
        m = b1 * m + (1 - b1) * curvature * x
        if t in (1, 3):
            h = b2 * h + (1 - b2) * curvature
        x = x * (1 - lr * wd) - lr * (m / (gamma * h)).clamp(-1, 1)
        torch.testing.assert_close(w.detach(), x, **CLOSE)


def test_negative_curvature_takes_the_sign_step():
    x = doubles(1.0, 1.0)
    sophia([x], [doubles(1e-3, -1e-3)], [doubles(0, 0)], [doubles(-5, -5)], lr=0.1, b1=0.9, gamma=1, eps=1e-12, wd=0)
    torch.testing.assert_close(x, doubles(0.9, 1.1), **CLOSE)


def test_win_rate_counts_what_was_not_clipped_and_grows_with_gamma():
    rates = []
    for gamma in (0.01, 0.1, 1.0, 10.0):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(400, dtype=torch.float64))
        optimizer = SophiaH([w], lr=0.0, gamma=gamma, betas=(0.0, 0.0), weight_decay=0.0, distribution="rademacher")
        assert optimizer.win_rate() == 0.0
        optimizer.step(Closure(lambda w=w: (w**2).sum() / 2, [w]))
        assert optimizer.win_rate() == (w.detach().abs() < gamma).double().mean()
        rates.append(optimizer.logged()["win_rate"])
    assert rates == sorted(rates)
    assert rates[0] < 0.05 < 0.95 < rates[-1]


# The estimators.


def test_hutchinson_is_exact_for_signs_and_a_diagonal_hessian():
    diagonal = doubles(3.0, -1.0, 0.5)
    u = draw_directions([torch.zeros(3, dtype=torch.float64)], "rademacher")
    assert torch.equal(hutchinson(u, [diagonal * u[0]])[0], diagonal)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_hutchinson_has_the_diagonal_as_its_mean(distribution):
    torch.manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    matrix = matrix + matrix.T
    draws = torch.stack([draw_directions([matrix[0]], distribution)[0] for _ in range(20_000)])
    estimates = draws * (draws @ matrix)
    error = estimates.std(0) / len(draws) ** 0.5
    assert ((estimates.mean(0) - matrix.diagonal()).abs() < 4 * error).all()
    assert abs(draws.mean()) < 0.02
    assert abs(draws.var() - 1) < 0.03


def test_gauss_newton_bartlett_has_the_gauss_newton_diagonal_as_its_mean():
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    w = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def sampled_loss(generator):
        logits = x @ w
        labels = torch.bernoulli(logits.detach().sigmoid(), generator=generator)
        return F.binary_cross_entropy_with_logits(logits, labels)

    closure = Closure(lambda: (x @ w).sum(), [w], sampled_loss_fn=sampled_loss)
    estimates = torch.stack([gauss_newton_bartlett(closure.sampled(), 6)[0] for _ in range(3000)])
    p = (x @ w).sigmoid().detach()
    truth = (p * (1 - p)) @ x**2 / 6  # for logistic regression this is the Hessian itself
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - truth).abs() < 4 * error).all()


def test_the_estimate_in_the_state_is_the_average_of_b_times_the_square():
    w = parameter(1.0, 2.0)
    sampled = doubles(0.5, -0.25)
    optimizer = SophiaG([w], betas=(0.9, 0.75), batch_size=8, update_every=1)
    closure = Closure(lambda: w.sum(), [w], sampled_loss_fn=lambda generator: (sampled * w).sum())
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[w]["hessian"], 0.25 * 8 * sampled**2, **CLOSE)
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[w]["hessian"], (0.75 * 0.25 + 0.25) * 8 * sampled**2, **CLOSE)


def test_directions_come_from_the_global_generator():
    like = [torch.zeros(3), torch.zeros(()), torch.zeros(0, 2)]
    torch.manual_seed(3)
    first = draw_directions(like, "gaussian")
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, draw_directions(like, "gaussian"), strict=True))
    assert not torch.equal(first[0], draw_directions(like, "gaussian")[0])


def test_all_ranks_draw_the_directions_of_the_first(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda seed, src: seed.fill_(5))
    drawn = []
    for own_seed in (0, 1):
        torch.manual_seed(own_seed)
        drawn.append(draw_directions([torch.zeros(4)], "gaussian")[0])
    assert torch.equal(*drawn)


# Options, and the company it keeps.


def test_maximize_turns_the_curvature_of_hutchinson_around():
    w, v = parameter(1.0, 2.0), parameter(1.0, 2.0)
    options = {"lr": 0.1, "gamma": 1.0, "distribution": "rademacher"}
    descent, ascent = SophiaH([w], **options), SophiaH([v], maximize=True, **options)
    for _ in range(3):
        descent.step(Closure(lambda: (w**4).sum(), [w]))
        ascent.step(Closure(lambda: -(v**4).sum(), [v]))
    assert torch.equal(w, v)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"gamma": -0.1},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"update_every": 0},
        {"batch_size": 0},
        {"form": "papper"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        SophiaG([parameter(1.0)], **options)


def test_far_fewer_steps_than_adam_across_curvatures():
    curvature = doubles(1.0, 1e4)

    def steps(make, lr):
        w = parameter(1.0, 0.37)
        optimizer = make([w], lr)
        for t in range(1, 601):
            loss = optimizer.step(Closure(lambda: (curvature * w**2).sum() / 2, [w]))
            if loss < 1e-6:
                return t
        return 10_000

    def with_sophia(params, lr):
        options = {"betas": (0.0, 0.0), "gamma": 1.0, "weight_decay": 0.0, "distribution": "rademacher"}
        return SophiaH(params, lr, update_every=1, **options)

    rates = (0.03, 0.1, 1.0)
    ours = min(steps(with_sophia, lr) for lr in rates)
    adam = min(steps(lambda p, lr: torch.optim.Adam(p, lr), lr) for lr in rates)
    sgd = min(steps(lambda p, lr: torch.optim.SGD(p, lr * 1e-4), lr) for lr in rates)
    assert ours * 5 < min(adam, sgd)


def test_agrees_with_pytorch_optimizer():
    theirs_module = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    w, v = parameter(1.0, -2.0, 0.5), parameter(1.0, -2.0, 0.5)
    # Their clip is at p and their floor is on h: the same as ours with gamma = p, eps = p eps', lr = p lr'.
    theirs = theirs_module.SophiaH([v], lr=0.5, betas=(0.96, 0.99), p=0.01, update_period=1, eps=1e-12)
    ours = SophiaH([w], lr=0.5 * 0.01, betas=(0.96, 0.99), gamma=0.01, eps=1e-14, weight_decay=0.0, update_every=1)
    for _ in range(4):
        hessian, g = torch.rand(3, dtype=torch.float64) * 30, torch.randn(3, dtype=torch.float64)
        ours._estimate = lambda closure, hessian=hessian: [hessian]  # type: ignore[method-assign]
        ours.step(Closure(lambda g=g: (g * w).sum(), [w]))
        v.grad = g
        theirs.step(hessian=[hessian])
        torch.testing.assert_close(w, v, **CLOSE)
