"""Random scaling: one exponential number a step for all parameters, around any optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail_optimizers import RandomlyScaledSGDM, RandomScaling, rs_sgdm
from lightrail_optimizers.transforms import random_scaling
from lightrail_optimizers.transforms.random_scaling import scale_update_

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(6, 5, generator=generator).to(dtype), torch.randint(3, (6,), generator=generator)


def train(model, optimizer, count=5, dtype=torch.float32):
    torch.manual_seed(1)
    for step in range(count):
        loss = lambda b: F.cross_entropy(model(b[0]), b[1])  # noqa: E731
        optimizer.step(Closure(loss, list(model.parameters()), batch(step, dtype)))
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_loop_written_by_hand(name):
    ours, theirs = network(), network()
    found = train(ours, TransformedOptimizer(OPTIMIZERS[name](ours.parameters()), [RandomScaling()]))
    params = list(theirs.parameters())
    optimizer = OPTIMIZERS[name](params)
    torch.manual_seed(1)
    for step in range(5):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(theirs(inputs), targets).backward()
        previous = [p.detach().clone() for p in params]
        optimizer.step()
        s = rs_sgdm.draw_exponential(params[0])
        with torch.no_grad():
            for p, x in zip(params, previous, strict=True):
                p.lerp_(x, 1 - s)
    assert same(found, [p.detach() for p in params])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_one_is_the_optimizer_alone(monkeypatch, name, dtype):
    monkeypatch.setattr(random_scaling, "draw_exponential", lambda like: 1.0)
    ours, plain = network(dtype), network(dtype)
    found = train(ours, TransformedOptimizer(OPTIMIZERS[name](ours.parameters()), [RandomScaling()]), dtype=dtype)
    expected = train(plain, TransformedOptimizer(OPTIMIZERS[name](plain.parameters())), dtype=dtype)
    assert same(found, expected)


def test_around_sgd_it_is_the_optimizer_of_that_name():
    ours, theirs = network(torch.float64), network(torch.float64)
    wrapped = TransformedOptimizer(OPTIMIZERS["sgd"](ours.parameters()), [RandomScaling()])
    found = train(ours, wrapped, 12, torch.float64)
    whole = TransformedOptimizer(RandomlyScaledSGDM(theirs.parameters(), lr=0.1, momentum=0.9))
    expected = train(theirs, whole, 12, torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.3, 0.5, 1.7, 9.0])
def test_the_update_is_as_long_as_the_number_says(s):
    x = [torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64), torch.zeros(0)]
    previous = [torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64), torch.zeros(0)]
    scale_update_(x, previous, s)
    assert x[0].tolist() == pytest.approx([1 + 2 * s, -2 + s], abs=1e-12)
    assert x[1].item() == 2.0


def test_one_number_a_step_and_another_at_the_next():
    some = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(4, 3), (), (5,)]]
    optimizer = TransformedOptimizer(
        torch.optim.SGD([{"params": some[:1]}, {"params": some[1:]}], lr=1.0), [scaling := RandomScaling()]
    )
    assert scaling.logged() == {}
    scales = []
    for _ in range(5):
        before = [p.detach().clone() for p in some]
        optimizer.step(Closure(lambda: torch.stack([p.sum() for p in some]).sum(), some))
        moved = torch.cat([(b - p).flatten() for b, p in zip(before, some, strict=True)]).detach()
        assert float(moved.max() - moved.min()) < 1e-12
        assert scaling.logged() == {"scale": pytest.approx(float(moved[0]), abs=1e-12)}
        scales.append(float(moved[0]))
    assert len(set(scales)) == 5


def test_parameters_that_do_not_move_stay_bit_for_bit():
    moving, still = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(50))
    before = still.detach().clone()
    optimizer = TransformedOptimizer(torch.optim.SGD([moving, still], lr=1.0), [RandomScaling()])
    for _ in range(10):
        optimizer.step(Closure(lambda: moving.sum(), [moving, still]))
    assert torch.equal(still, before)


def test_a_seed_repeats_the_path_and_another_does_not():
    def path(seed):
        model = network()
        optimizer = TransformedOptimizer(OPTIMIZERS["adamw"](model.parameters()), [RandomScaling()])
        loss = lambda b: F.cross_entropy(model(b[0]), b[1])  # noqa: E731
        torch.manual_seed(seed)
        optimizer.step(Closure(loss, list(model.parameters()), batch(0)))
        return [p.detach() for p in model.parameters()]

    assert same(path(3), path(3))
    assert not same(path(3), path(4))


def test_it_needs_no_more_than_the_gradient():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [RandomScaling()]).step()
    assert w[0].item() == w[1].item() < 1
