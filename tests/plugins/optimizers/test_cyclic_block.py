"""Cyclic block descent: Gauss-Seidel by hand, proximal steps, what is evaluated, and the recursive estimate."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure
from lightrail.errors import ClosureError, ConfigurationError
from lightrail_optimizers import CyclicBlock, VarianceReducedCyclicBlock
from lightrail_optimizers.cyclic_block import proximal_step_

CLOSE = {"rtol": 0, "atol": 1e-12}
HESSIAN = torch.tensor([[4.0, 1.0, -1.0], [1.0, 2.0, 0.5], [-1.0, 0.5, 5.0]], dtype=torch.float64)
TARGET = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def scalars():
    return [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.0, 1.0, 1.0)]


def named(params):
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


def quadratic(params, hessian=HESSIAN, target=TARGET):
    def loss():
        x = torch.stack(list(params))
        return x @ hessian @ x / 2 - target @ x

    return Closure(loss, params)


def values(params):
    return torch.stack([p.detach() for p in params])


# The cycle.


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_it_is_gauss_seidel_on_a_quadratic(order):
    params = scalars()
    groups = [{"params": [pair], "lr": 1 / float(HESSIAN[i, i])} for i, pair in enumerate(named(params))]
    optimizer = CyclicBlock(groups, order=order)
    x, h, b = np.ones(3), HESSIAN.numpy(), TARGET.numpy()
    for _ in range(4):
        optimizer.step(quadratic(params))
        for i in range(3) if order == "forward" else reversed(range(3)):
            x[i] = (b[i] - h[i] @ x + h[i, i] * x[i]) / h[i, i]
        np.testing.assert_allclose(values(params).numpy(), x, rtol=0, atol=1e-12)


def test_one_cycle_by_hand():
    params = scalars()
    optimizer = CyclicBlock(named(params), lr=0.1)
    loss = optimizer.step(quadratic(params))
    # x1 = 1 - .1 (4 + 1 - 1 - 1) = .7; x2 = 1 - .1 (.7 + 2 + .5 + 2) = .48; x3 = 1 - .1 (-.7 + .24 + 5 - 3) = .846.
    torch.testing.assert_close(values(params), torch.tensor([0.7, 0.48, 0.846], dtype=torch.float64), **CLOSE)
    assert loss.item() == pytest.approx(4.0, abs=1e-12)  # (4 + 2 + 5 + 2 - 2 + 1) / 2 - 2, where the step began


def test_blocks_may_take_steps_that_gradient_descent_may_not():
    # The Hessian of all ones has norm 8, each of its blocks has 1.
    params = [nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(8)]
    optimizer = CyclicBlock(named(params), lr=1.0)
    hessian = 1 + torch.eye(8, dtype=torch.float64) / 50
    nothing = torch.zeros(8, dtype=torch.float64)
    losses = [optimizer.step(quadratic(params, hessian, nothing)).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0] / 50


@pytest.mark.parametrize(("prox", "strength"), [("none", 0.0), ("l1", 0.3), ("l2", 0.3)])
def test_one_block_is_proximal_gradient_descent(prox, strength):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64))
    optimizer = CyclicBlock([("weight", w)], lr=0.1, prox=prox, strength=strength)
    x, h, b = w.detach().numpy().copy(), HESSIAN.numpy(), TARGET.numpy()
    for _ in range(5):
        closure = Closure(lambda: w @ HESSIAN @ w / 2 - TARGET @ w, [w])
        optimizer.step(closure)
        assert closure.evaluations == 1
        x = x - 0.1 * (h @ x - b)
        if prox == "l1":
            x = np.sign(x) * np.maximum(np.abs(x) - 0.03, 0)
        elif prox == "l2":
            x = x / 1.03
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=0, atol=1e-12)


def test_soft_thresholds_end_at_exact_zeros():
    x = [torch.tensor([0.05, -0.05, 0.2, -0.2, 0.0], dtype=torch.float64)]
    proximal_step_(x, [torch.zeros(5, dtype=torch.float64)], lr=0.5, prox="l1", strength=0.2)
    torch.testing.assert_close(x[0], torch.tensor([0.0, 0.0, 0.1, -0.1, 0.0], dtype=torch.float64), **CLOSE)
    assert x[0].count_nonzero() == 2


def test_it_solves_the_lasso():
    params = [nn.Parameter(torch.tensor(0.0, dtype=torch.float64)) for _ in range(3)]
    optimizer = CyclicBlock(named(params), lr=0.2, prox="l1", strength=2.5)
    for _ in range(50):
        optimizer.step(quadratic(params))
    # By hand: x3 = (3 - 2.5) / 5, and the gradients of the other two, -1.1 and 2.05, stay below 2.5.
    torch.testing.assert_close(values(params), torch.tensor([0.0, 0.0, 0.1], dtype=torch.float64), **CLOSE)
    assert values(params)[:2].count_nonzero() == 0


# Blocks, evaluations and gradients.


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.norm: Any = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


def closure_of(model, seed=0):
    return Closure(lambda b: F.cross_entropy(model(b[0]), b[1]), list(model.parameters()), batch(seed), module=model)


def test_a_layer_is_a_block_and_a_number_joins_layers():
    model = Network()
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}

    def blocks(count):
        optimizer = CyclicBlock(model.named_parameters(), blocks=count)
        return [[names[p].split(".")[0] for p in block] for block in optimizer.blocks]

    each = [["first"] * 2, ["norm"] * 2, ["second"] * 2, ["unused"] * 2]
    assert blocks(None) == blocks(4) == blocks(9) == each
    assert blocks(2) == [["first"] * 2 + ["norm"] * 2, ["second"] * 2 + ["unused"] * 2]
    assert [len(block) for block in blocks(3)] == [2, 2, 4]
    assert len(blocks(1)) == 1
    # A layer whose weight and bias lie in different groups is one block.
    weights = [pair for pair in model.named_parameters() if pair[0].endswith("weight")]
    biases = [pair for pair in model.named_parameters() if pair[0].endswith("bias")]
    optimizer = CyclicBlock([{"params": weights}, {"params": biases, "lr": 0.0}])
    assert [names[p] for p in optimizer.blocks[0]] == ["first.weight", "first.bias"]


def test_each_block_is_one_evaluation_and_statistics_move_once():
    model, twin = Network().double(), Network().double()
    optimizer, closure = CyclicBlock(model.named_parameters(), lr=0.1), closure_of(model)
    optimizer.step(closure)
    assert closure.evaluations == 3  # the unused layer has no gradient
    closure_of(twin)()
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert torch.equal(model.norm.running_var, twin.norm.running_var)


def test_a_parameter_without_gradient_does_not_shrink():
    model = Network().double()
    before = copy.deepcopy(model.unused.state_dict())
    CyclicBlock(model.named_parameters(), prox="l2", strength=1.0).step(closure_of(model))
    for name, value in model.unused.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_copy_goes_the_same_way():
    model = Network().double()
    optimizer = VarianceReducedCyclicBlock(model.named_parameters(), probability=0.3, order="backward", blocks=2)
    optimizer.step(closure_of(model))
    model_twin, twin = copy.deepcopy((model, optimizer))
    for each, its_optimizer in ((model, optimizer), (model_twin, twin)):
        torch.manual_seed(5)
        for seed in range(1, 6):
            its_optimizer.step(closure_of(each, seed))
    for p, q in zip(model.parameters(), model_twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_they_refuse():
    params = scalars()
    wrong: list[dict[str, Any]] = [{"lr": -1.0}, {"order": "any"}, {"prox": "l0"}, {"strength": -1.0}, {"blocks": 0}]
    for cls in (CyclicBlock, VarianceReducedCyclicBlock):
        with pytest.raises(ClosureError, match="for each block"):
            cls(named(params)).step()
        with pytest.raises(ConfigurationError, match="named parameters"):
            cls(params)
        for options in wrong:
            with pytest.raises(ConfigurationError):
                cls(named(params), **options)
    for probability in (0.0, 1.5):
        with pytest.raises(ConfigurationError):
            VarianceReducedCyclicBlock(named(params), probability=probability)
    with pytest.raises(ClosureError, match="does not know"):
        CyclicBlock(named(params)).step(_of_some(params))


def _of_some(params):
    for p in params:
        p.grad = torch.ones_like(p)
    return Closure(lambda: params[0].square(), params[:1])


# Variance reduction.


def test_always_fresh_is_the_plain_method():
    plain, reduced = Network().double(), Network().double()
    first = CyclicBlock(plain.named_parameters(), lr=0.1)
    second = VarianceReducedCyclicBlock(reduced.named_parameters(), lr=0.1, probability=1.0)
    for seed in range(4):
        first.step(closure_of(plain, seed))
        second.step(closure_of(reduced, seed))
    for p, q in zip(plain.parameters(), reduced.parameters(), strict=True):
        assert torch.equal(p, q)


def test_on_one_batch_the_recursion_is_exact():
    # v_i telescopes only where the old point is the one at which v_i was taken: earlier blocks moved, later ones not.
    plain, reduced = Network().double(), Network().double()
    first = CyclicBlock(plain.named_parameters(), lr=0.3)
    second = VarianceReducedCyclicBlock(reduced.named_parameters(), lr=0.3, probability=1e-9)
    for step in range(5):
        first.step(closure_of(plain))
        closure = closure_of(reduced)
        second.step(closure)
        assert closure.evaluations == (3 if step == 0 else 6)
    for p, q in zip(plain.parameters(), reduced.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_the_recursion_by_hand_on_changing_batches(monkeypatch):
    params, lr = scalars(), 0.05
    optimizer = VarianceReducedCyclicBlock(named(params), lr=lr, probability=0.5)
    coins = [[True] * 3, [False, True, False], [False] * 3, [True, False, False]]
    x, v, old = np.ones(3), np.zeros(3), np.ones(3)
    for t, fresh in enumerate(coins):
        h, b = HESSIAN.numpy() * (1 + 0.3 * t), TARGET.numpy() + t
        start = x.copy()
        for i in range(3):
            before = np.concatenate([start[:i], old[i:]])
            g = h[i] @ x - b[i]
            v[i] = g if fresh[i] else v[i] + g - (h[i] @ before - b[i])
            x[i] -= lr * v[i]
        old = start
        monkeypatch.setattr(optimizer, "_coins", lambda blocks, fresh=fresh: fresh)
        closure = quadratic(params, torch.from_numpy(h), torch.from_numpy(b))
        optimizer.step(closure)
        assert closure.evaluations == 6 - sum(fresh)
        np.testing.assert_allclose(values(params).numpy(), x, rtol=0, atol=1e-12)


def test_coins_fall_as_often_as_they_should_and_cost_what_they_should():
    params = scalars()
    optimizer = VarianceReducedCyclicBlock(named(params), lr=0.01, probability=0.25)
    torch.manual_seed(0)
    coins = [coin for _ in range(400) for coin in optimizer._coins([[p] for p in params])]
    assert abs(np.mean(coins) - 0.25) < 0.05
    spent = 0
    for _ in range(100):
        closure = quadratic(params)
        optimizer.step(closure)
        spent += closure.evaluations
    assert abs(spent / 100 - 3 * 1.75) < 0.3


def test_a_parameter_that_comes_back_starts_afresh():
    a, b = (nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(2))
    optimizer = VarianceReducedCyclicBlock([("a.w", a), ("b.w", b)], lr=0.1, probability=1e-9)
    optimizer.step(Closure(lambda: (a.square() + b.square()) / 2, [a, b]))
    optimizer.step(Closure(lambda: a.square() / 2, [a, b]))
    assert b not in optimizer.state
    assert b.item() == 0.9
    optimizer.step(Closure(lambda: (a + b).square() / 2, [a, b]))
    assert b.item() == pytest.approx(0.9 - 0.1 * (a.item() + 0.9), abs=1e-12)
