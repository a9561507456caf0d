"""PrimalDual: constraints that are kept, multipliers that say what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import PrimalDual
from lightrail_optimizers.added_gradient import add_gradient_
from lightrail_optimizers.transforms.primal_dual import Multiplier, dual_ascent


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def returned_by(model):
    """A loss, and two scalars to be bounded: a size of the logits and one of the first layer's weights."""

    def fn(batch):
        logits = model(batch[0])
        size = model[0].weight.square().sum()
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.square().mean(), "weights": size}

    return fn


def train(model, transforms, count=1, steps=4, inner=torch.optim.SGD):
    optimizer = TransformedOptimizer(inner(model.parameters(), lr=0.1), transforms)
    spent = []
    for step in range(steps):
        torch.manual_seed(step)
        closure = Closure(returned_by(model), list(model.parameters()), *window(step, count), module=model)
        torch.manual_seed(step)  # the masks of dropout
        optimizer.step(closure)
        spent.append(closure.evaluations)
    return spent


def by_hand(model, bounds, lr, every, count, steps=4, inner=torch.optim.SGD, start=0.0):
    optimizer = inner(model.parameters(), lr=0.1)
    multipliers, sums = dict.fromkeys(bounds, start), dict.fromkeys(bounds, 0.0)
    for step in range(steps):
        batches = window(step, count)
        parts = {}
        for name in ("loss", *bounds):
            torch.manual_seed(step)
            optimizer.zero_grad()
            total = 0
            for batch in batches:
                value = returned_by(model)(batch)[name] / count
                value.backward()
                total = total + value.detach()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            parts[name] = total, gradients
        for p, g in zip(model.parameters(), parts["loss"][1], strict=True):
            p.grad = g
        for name in bounds:
            if multipliers[name]:
                for p, g in zip(model.parameters(), parts[name][1], strict=True):
                    p.grad = p.grad.add(g, alpha=multipliers[name])
        for name, bound in bounds.items():
            sums[name] += parts[name][0].double().item() - bound
            if (step + 1) % every == 0:
                multipliers[name] = max(0.0, multipliers[name] + lr * (sums[name] / every))
                sums[name] = 0.0
        optimizer.step()
    return multipliers


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# By hand.


def test_the_least_square_above_one():
    x = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    transform = PrimalDual({"short": 0.0}, dual_lr=0.2)
    optimizer = TransformedOptimizer(torch.optim.SGD([x], lr=0.1), [transform])
    for _ in range(600):  # min x² s.t. 1 - x <= 0: x* = 1, and 2x* = lambda*
        optimizer.step(Closure(lambda: {"loss": x**2, "short": 1 - x}, [x]))
        assert transform.logged()["multiplier_short"] >= 0
    assert x.item() == pytest.approx(1.0, abs=1e-9)
    assert transform.logged()["multiplier_short"] == pytest.approx(2.0, abs=1e-9)
    assert transform.logged()["slack_short"] == pytest.approx(0.0, abs=1e-9)


def test_the_first_steps_of_that_problem():
    """lambda counts in a step as it was before it, and its own step sees x as it was."""
    x = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    transform = PrimalDual({"short": 0.0}, dual_lr=0.2)
    optimizer = TransformedOptimizer(torch.optim.SGD([x], lr=0.1), [transform])
    expected_x, expected_multiplier = 0.0, 0.0
    for _ in range(4):
        optimizer.step(Closure(lambda: {"loss": x**2, "short": 1 - x}, [x]))
        expected_x, expected_multiplier = (
            expected_x - 0.1 * (2 * expected_x - expected_multiplier),
            max(0.0, expected_multiplier + 0.2 * (1 - expected_x)),
        )
        assert x.item() == pytest.approx(expected_x, abs=1e-12)
        assert transform.logged()["multiplier_short"] == pytest.approx(expected_multiplier, abs=1e-12)
    assert expected_multiplier > 0.5


def test_a_loose_constraint_costs_nothing():
    x = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    transform = PrimalDual({"long": 1.0}, dual_lr=0.5)
    optimizer = TransformedOptimizer(torch.optim.SGD([x], lr=0.1), [transform])
    for _ in range(200):  # min x² s.t. x <= 1, broken at first
        optimizer.step(Closure(lambda: {"loss": x**2, "long": x}, [x]))
    assert x.item() == pytest.approx(0.0, abs=1e-9)
    assert transform.logged()["multiplier_long"] == 0.0


def test_dual_ascent_stops_at_zero():
    assert dual_ascent(0.5, -3.0, 0.1) == pytest.approx(0.2)
    assert dual_ascent(0.1, -3.0, 0.1) == 0.0
    assert dual_ascent(0.1, -math.inf, 0.1) == 0.0
    assert math.isnan(dual_ascent(0.1, math.nan, 0.1))


def test_a_dual_step_takes_the_mean_since_the_last():
    multiplier = Multiplier(bound=1.0, lr=0.1, every=3)
    seen = []
    for loss in (2.0, 3.0, 7.0, 1.0, 1.0, 1.0):
        multiplier.measure(loss)
        seen.append(multiplier.value)
    assert seen == pytest.approx([0.0, 0.0, 0.3, 0.3, 0.3, 0.3])
    assert multiplier.slack == 0.0


# Against a loop.


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_equals_the_loop_written_by_hand(count, every, inner):
    bounds = {"logits": 0.01, "weights": 0.5}
    ours, theirs, plain = network(), network(), network()
    transform = PrimalDual(bounds, dual_lr=0.3, dual_every=every)
    train(ours, [transform], count, inner=inner)
    multipliers = by_hand(theirs, bounds, 0.3, every, count, inner=inner)
    train(plain, [], count, inner=inner)
    assert same(ours, theirs)
    assert not same(ours, plain)
    assert {name: m.value for name, m in transform.constraints.items()} == multipliers
    assert all(value > 0 for value in multipliers.values())


def test_an_infinite_bound_is_the_optimizer_alone():
    ours, plain = network(), network()
    transform = PrimalDual({"logits": math.inf, "weights": 1e9}, dual_lr=10.0)
    train(ours, [transform], 2)
    train(plain, [], 2)
    assert same(ours, plain)
    assert transform.logged()["multiplier_logits"] == 0.0
    assert transform.logged()["slack_logits"] == math.inf


def test_a_bound_on_the_loss_itself_scales_its_gradient():
    x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    for returned in (lambda: x**2, lambda: {"loss": x**2}):
        with torch.no_grad():
            x.fill_(2.0)
        transform = PrimalDual({"loss": 1.0}, dual_lr=0.5, multiplier=3.0)
        TransformedOptimizer(torch.optim.SGD([x], lr=0.1), [transform]).step(Closure(returned, [x]))
        assert x.item() == pytest.approx(2.0 - 0.1 * 4 * 4.0, abs=1e-12)
        assert transform.logged()["multiplier_loss"] == pytest.approx(3 + 0.5 * 3.0)


# What it asks of its closure.


def test_it_spends_one_evaluation_for_each_constraint():
    assert train(network(), [PrimalDual({"logits": 0.01, "weights": 1e9})]) == [3, 3, 3, 3]
    assert traits_of(PrimalDual, {"constraints": {"a": 1.0, "b": 1.0}}).extra_evaluations == 2


def test_only_positive_multipliers_are_differentiated():
    x = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    graphs = []

    def returned():
        long = x * 1
        graphs.append(long.requires_grad)
        return {"loss": x**2, "long": long}

    optimizer = TransformedOptimizer(torch.optim.SGD([x], lr=0.1), [PrimalDual({"long": 1.0})])
    for _ in range(2):
        optimizer.step(Closure(returned, [x]))
    # The loss and the first look at the constraint; the loss and a look without a graph.
    assert graphs == [True, True, True, False]


def test_names_that_nothing_has_and_scalars_without_a_gradient():
    w = nn.Parameter(torch.ones(2))

    def step(name):
        optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [PrimalDual({name: 1e9})])
        optimizer.step(Closure(lambda: {"loss": w.sum(), "hits": (w > 0).float().mean()}, [w]))

    with pytest.raises(ClosureError, match="nothing named 'fairnes'"):
        step("fairnes")
    with pytest.raises(ClosureError, match="'hits' does not depend"):
        step("hits")
    assert w.tolist() == [1.0, 1.0]


def test_options():
    for nothing in (None, {}):
        with pytest.raises(ConfigurationError, match="no constraint"):
            PrimalDual(nothing)
    with pytest.raises(ConfigurationError, match=r"constraints\.fairness"):
        PrimalDual({"fairness": -math.inf})
    with pytest.raises(ConfigurationError, match=r"constraints\.fairness"):
        PrimalDual({"fairness": math.nan})
    with pytest.raises(ConfigurationError, match="dual_lr"):
        PrimalDual({"fairness": 0.1}, dual_lr=0.0)
    with pytest.raises(ConfigurationError, match="dual_every"):
        PrimalDual({"fairness": 0.1}, dual_every=0)
    with pytest.raises(ConfigurationError, match="multiplier"):
        PrimalDual({"fairness": 0.1}, multiplier=-1.0)


def test_a_resumed_run_goes_on_within_a_dual_period():
    whole, halves = network(), network()
    train(whole, [PrimalDual({"logits": 0.01}, dual_lr=0.3, dual_every=3)], steps=4)
    first = PrimalDual({"logits": 0.01}, dual_lr=0.3, dual_every=3)
    train(halves, [first], steps=2)
    second = PrimalDual({"logits": 0.01}, dual_lr=0.3, dual_every=3)
    second.load_state_dict(first.state_dict())
    optimizer = TransformedOptimizer(torch.optim.SGD(halves.parameters(), lr=0.1), [second])
    for step in (2, 3):
        closure = Closure(returned_by(halves), list(halves.parameters()), *window(step, 1), module=halves)
        torch.manual_seed(step)
        optimizer.step(closure)
    assert same(whole, halves)
    assert second.logged()["multiplier_logits"] > 0


# Gradients that are missing.


def test_a_parameter_that_only_a_constraint_sees_moves_and_one_that_nothing_sees_does_not():
    seen, unseen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    free = nn.Parameter(torch.ones(2))
    params = [free, seen, unseen, frozen]
    optimizer = TransformedOptimizer(
        torch.optim.SGD(params, lr=0.1, weight_decay=0.5), [PrimalDual({"short": 0.0}, multiplier=2.0)]
    )
    optimizer.step(Closure(lambda: {"loss": free.sum(), "short": (3 * seen + frozen).sum()}, params))
    assert seen.tolist() == pytest.approx([1 - 0.1 * (6 + 0.5)] * 2)
    assert unseen.tolist() == frozen.tolist() == [1.0, 1.0]
    assert unseen.grad is None


def test_sparse_gradients_are_refused_by_name():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ConfigurationError, match="sparse"):
        add_gradient_("primal_dual", [p], [torch.ones(3, 2)], 1.0)
