"""Block coordinate descent: rules by hand, curvature of blocks, greedy progress."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import BlockCoordinate

CLOSE = {"rtol": 0, "atol": 1e-12}
HESSIAN = torch.tensor([[9.0, 1.0, 2.0], [1.0, 4.0, 0.0], [2.0, 0.0, 1.0]], dtype=torch.float64)


def blocks(*points):
    return [nn.Parameter(torch.tensor(point, dtype=torch.float64)) for point in points]


def named(params):
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


def quadratic(params, hessian=HESSIAN):
    def loss():
        x = torch.cat([p.flatten() for p in params])
        return x @ hessian @ x / 2

    return Closure(loss, params)


def values(params):
    return torch.cat([p.detach().flatten() for p in params]).tolist()


# Rules by hand.


# At (1, 1.5, -1) the gradient is (8.5, 7, 1); over the roots of 9, 4 and 1 it is (2.83, 3.5, 1).
@pytest.mark.parametrize(
    ("select", "inner", "expected"),
    [
        ("gs", "scaled", [1 - 8.5 / 9, 1.5, -1.0]),
        ("gsl", "scaled", [1.0, 1.5 - 7 / 4, -1.0]),
        ("cyclic", "scaled", [1 - 8.5 / 9, 1.5, -1.0]),
        ("gs", "gradient", [1 - 0.5 * 8.5, 1.5, -1.0]),
        ("gsl", "gradient", [1.0, 1.5 - 0.5 * 7, -1.0]),
    ],
)
def test_one_step_by_hand(select, inner, expected):
    params = blocks(1.0, 1.5, -1.0)
    lr = {"scaled": 1.0, "gradient": 0.5}[inner]
    optimizer = BlockCoordinate(named(params), lr, select=select, inner=inner, lipschitz=[9.0, 4.0, 1.0])
    loss = optimizer.step(quadratic(params))
    assert values(params) == pytest.approx(expected, abs=1e-12)
    assert loss.item() == pytest.approx((8.5 + 10.5 - 1) / 2, abs=1e-12)


def test_scaled_steps_of_one_coordinate_are_exact_minimisations():
    params = blocks(1.0, 1.5, -1.0)
    optimizer = BlockCoordinate(named(params), select="cyclic", lipschitz=HESSIAN.diagonal().tolist())
    x = torch.tensor([1.0, 1.5, -1.0], dtype=torch.float64)
    for step in range(7):
        i = step % 3
        x[i] -= (HESSIAN[i] @ x) / HESSIAN[i, i]
        optimizer.step(quadratic(params))
        assert values(params) == pytest.approx(x.tolist(), abs=1e-12)


def test_maximize_ascends():
    params = blocks(1.0, 1.5, -1.0)
    BlockCoordinate(named(params), 0.5, "gs", "gradient", maximize=True).step(quadratic(params))
    assert values(params) == pytest.approx([1 + 0.5 * 8.5, 1.5, -1.0], abs=1e-12)


def active_blocks(optimizer, params, steps, loss=None):
    found = []
    for _ in range(steps):
        before = values(params)
        optimizer.step(Closure(loss, params) if loss else quadratic(params))
        moved = [i for i, (a, b) in enumerate(zip(before, values(params), strict=True)) if a != b]
        assert len(moved) <= 1
        found.append(moved[0] if moved else None)
    return found


def test_cyclic_goes_round_holds_and_passes_over_what_has_no_gradient():
    params = blocks(1.0, 1.5, -1.0)
    once = BlockCoordinate(named(params), 0.01, "cyclic", "gradient")
    assert active_blocks(once, params, 7) == [0, 1, 2, 0, 1, 2, 0]
    held = BlockCoordinate(named(params), 0.01, "cyclic", "gradient", switch_every=3)
    assert active_blocks(held, params, 7) == [0, 0, 0, 1, 1, 1, 2]
    without = BlockCoordinate(named(params), 0.01, "cyclic", "gradient")
    assert active_blocks(without, params, 4, lambda: params[0] * params[2]) == [0, 2, 0, 2]


def test_random_takes_every_block_equally_often():
    torch.manual_seed(0)
    params = blocks(1.0, 1.5, -1.0)
    optimizer = BlockCoordinate(named(params), 1e-6, "random", "gradient")
    found = active_blocks(optimizer, params, 300)
    assert all(abs(found.count(i) / 300 - 1 / 3) < 0.1 for i in range(3))


def test_the_norm_is_that_of_a_whole_block():
    a, b, c = blocks([1.0, 1.0], [1.0, 1.0], [1.8])
    pairs = [("one.weight", a), ("one.bias", b), ("two.weight", c)]
    for p in (a, b, c):
        p.grad = p.detach().clone()
    BlockCoordinate(pairs, 1.0, "gs", "gradient").step()
    assert values([a, b, c]) == [0.0, 0.0, 0.0, 0.0, 1.8]


# Curvature.


def test_estimates_are_the_largest_curvatures_within_blocks():
    torch.manual_seed(0)
    params = blocks([1.0, 2.0], [0.5, -1.0, 1.0])
    half = torch.randn(5, 5, dtype=torch.float64)
    hessian = half + half.T  # indefinite: what counts is the magnitude
    optimizer = BlockCoordinate(named(params), 0.0, power_iterations=300)
    closure = quadratic(params, hessian)
    optimizer.step(closure)
    exact = [float(torch.linalg.eigvalsh(block).abs().max()) for block in (hessian[:2, :2], hessian[2:, 2:])]
    assert optimizer.param_groups[0]["estimates"] == pytest.approx(exact, rel=1e-6)
    assert closure.evaluations == 1 + 2 * 300


def test_estimates_are_refreshed_when_due_and_only_then():
    params = blocks(1.0, 1.5, -1.0)
    optimizer = BlockCoordinate(named(params), refresh_every=3, power_iterations=2)
    for step in range(7):
        closure = quadratic(params, HESSIAN * (1 + step))
        optimizer.step(closure)
        assert closure.evaluations == (7 if step % 3 == 0 else 1)
        seen = step - step % 3
        assert optimizer.param_groups[0]["estimates"] == pytest.approx([9.0 + 9 * seen, 4.0 + 4 * seen, 1.0 + seen])
    with torch.enable_grad():
        for p in params:
            p.grad = torch.ones_like(p)
    optimizer.step()  # no estimate is due, so that gradients are enough
    assert optimizer.param_groups[0]["steps"] == 8


def test_a_block_that_was_silent_is_estimated_when_it_speaks():
    params = blocks(1.0, 1.5)
    optimizer = BlockCoordinate(named(params))
    optimizer.step(Closure(lambda: 3 * params[0].square(), params))
    assert optimizer.param_groups[0]["estimates"] == pytest.approx([6.0, 0.0])
    optimizer.step(Closure(lambda: 3 * params[0].square() + params[1].square(), params))
    assert optimizer.param_groups[0]["estimates"] == pytest.approx([6.0, 2.0])


def test_a_flat_block_moves_by_a_bounded_step():
    params = blocks(1.0, 2.0)
    optimizer = BlockCoordinate(named(params), least_lipschitz=0.5)
    optimizer.step(Closure(lambda: params[0] * 3 + params[1] * 2, params))
    assert values(params) == [1 - 3 / 0.5, 2.0]


def test_gsl_makes_more_progress_than_gs_where_curvatures_differ():
    curvature = torch.logspace(0, 4, 8, dtype=torch.float64)

    def losses(select):
        params = [nn.Parameter((1 + 0.1 * i) / curvature[i].sqrt() ** 1.2) for i in range(8)]
        optimizer = BlockCoordinate(named(params), select=select, lipschitz=(2 * curvature).tolist())
        return [optimizer.step(quadratic(params, curvature.diag())).item() for _ in range(40)]

    gs, gsl = losses("gs"), losses("gsl")
    assert all(b <= a for a, b in zip(gs, gsl, strict=True))
    assert gsl[10] < 0.9 * gs[10]


def test_a_scaled_step_keeps_the_promise_of_its_rule():
    torch.manual_seed(1)
    half = torch.randn(6, 6, dtype=torch.float64)
    hessian = half @ half.T
    params = blocks([1.0, -1.0], [2.0, 0.5], [0.3, 1.0])
    bounds = [float(torch.linalg.eigvalsh(hessian[i : i + 2, i : i + 2]).max()) for i in (0, 2, 4)]
    optimizer = BlockCoordinate(named(params), lipschitz=bounds)
    for _ in range(10):
        _, gradient = quadratic(params, hessian).gradient()
        before = optimizer.step(quadratic(params, hessian)).item()
        promise = max(float(g.square().sum()) / (2 * bound) for g, bound in zip(gradient, bounds, strict=True))
        assert quadratic(params, hessian).loss().item() <= before - promise + 1e-12


# Traits, groups and refusals.


def test_needs_depend_on_the_options():
    estimating: list[dict[str, Any]] = [{}, {"select": "gs"}, {"inner": "adamw"}]
    for options in estimating:
        assert traits_of(BlockCoordinate, options).needs_second_derivatives
    for options in ({"lipschitz": [1.0]}, {"select": "gs", "inner": "gradient"}, {"select": "gs", "inner": "adamw"}):
        declared = traits_of(BlockCoordinate, options)
        assert not declared.evaluates_again
        assert declared.extra_evaluations == 0
        assert not declared.is_stochastic
    assert traits_of(BlockCoordinate, {"select": "random", "inner": "gradient"}).is_stochastic


def test_groups_have_their_own_learning_rates():
    params = blocks(1.0, 1.5)
    pairs = named(params)
    optimizer = BlockCoordinate([{"params": pairs[:1]}, {"params": pairs[1:], "lr": 0.0}], 0.5, "cyclic", "gradient")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    assert values(params) == [0.5, 1.5]
    late = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer.add_param_group({"params": [("layers.2.weight", late)], "lr": 1.0})
    late.grad = torch.ones_like(late)
    for _ in range(3):
        copy.deepcopy(optimizer).step()
        optimizer.step()
    assert values([*params, late]) == [0.0, 1.5, 1.0]


def test_what_it_refuses():
    params = blocks(1.0, 1.5)
    wrong: list[dict[str, Any]] = [
        {"lr": -1.0},
        {"select": "gsq"},
        {"inner": "newton"},
        {"blocks": 0},
        {"switch_every": 0},
        {"lipschitz": [1.0, 0.0]},
        {"refresh_every": 0},
        {"power_iterations": 0},
        {"least_lipschitz": 0.0},
        {"betas": (1.0, 0.9)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
    ]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            BlockCoordinate(named(params), **options)
    with pytest.raises(ConfigurationError, match="named parameters"):
        BlockCoordinate(params)
    with pytest.raises(ConfigurationError, match="one number a block"):
        BlockCoordinate(named(params), lipschitz=[1.0]).step(quadratic(params, torch.eye(2, dtype=torch.float64)))
    with pytest.raises(ClosureError, match="curvature"):
        BlockCoordinate(named(params)).step()
