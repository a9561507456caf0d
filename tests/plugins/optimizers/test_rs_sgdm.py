"""Randomly scaled momentum SGD: SGD at a scale of 1, one exponential number a step, and its average."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from lightrail.errors import ConfigurationError
from lightrail_optimizers import RandomlyScaledSGDM, rs_sgdm


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(4, 3), (), (5,)]]


def gradients(steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator).to(dtype) for p in params()] for _ in range(steps)]


def run(optimizer, params, grads):
    for each in grads:
        for p, g in zip(params, each, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 0.1}, {"maximize": True}])
def test_at_a_scale_of_one_it_is_sgd_bit_for_bit(monkeypatch, dtype, options):
    monkeypatch.setattr(rs_sgdm, "draw_exponential", lambda like: 1.0)
    ours, theirs = params(dtype), params(dtype)
    found = run(RandomlyScaledSGDM(ours, lr=0.05, **options), ours, gradients(10, dtype))
    expected = run(torch.optim.SGD(theirs, **{"lr": 0.05, "momentum": 0.9, **options}), theirs, gradients(10, dtype))
    assert same(found, expected)


def test_two_steps_by_hand(monkeypatch):
    scales = iter([2.0, 0.5])
    monkeypatch.setattr(rs_sgdm, "draw_exponential", lambda like: next(scales))
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = RandomlyScaledSGDM([w], lr=0.1, momentum=0.5)
    run(optimizer, [w], [[torch.tensor([1.0], dtype=torch.float64)]])
    assert w.item() == pytest.approx(0.8, abs=1e-12)
    run(optimizer, [w], [[torch.tensor([3.0], dtype=torch.float64)]])
    assert w.item() == pytest.approx(0.8 - 0.5 * 0.1 * 3.5, abs=1e-12)
    optimizer.eval()
    assert w.item() == pytest.approx((0.5 * 0.8 + 0.625) / 1.5, abs=1e-12)


def test_one_number_scales_every_parameter_of_a_step():
    some = params(torch.float64)
    optimizer = RandomlyScaledSGDM([{"params": some[:1]}, {"params": some[1:]}], lr=0.1, momentum=0.0)
    ratios = []
    for each in gradients(5, torch.float64):
        before = [p.detach().clone() for p in some]
        run(optimizer, some, [each])
        moved = torch.cat([((b - p) / g).flatten() for b, p, g in zip(before, some, each, strict=True)]).detach()
        assert float(moved.max() - moved.min()) < 1e-9
        ratios.append(float(moved.mean()) / 0.1)
    assert len({round(ratio, 9) for ratio in ratios}) == 5


def test_the_scale_is_exponential_of_mean_one():
    torch.manual_seed(0)
    like = torch.empty(1)
    drawn = np.array([rs_sgdm.draw_exponential(like) for _ in range(20_000)])
    assert drawn.min() > 0
    assert drawn.mean() == pytest.approx(1, abs=3 / 20_000**0.5)
    assert drawn.var() == pytest.approx(1, abs=3 * (8 / 20_000) ** 0.5)  # the fourth central moment is 9
    for level in (0.1, 0.5, 0.9, 0.99):
        share = (drawn < -np.log(1 - level)).mean()
        assert share == pytest.approx(level, abs=3 * (level * (1 - level) / 20_000) ** 0.5)


def test_a_seed_repeats_the_path_and_another_does_not():
    def path(seed):
        some = params()
        torch.manual_seed(seed)
        return run(RandomlyScaledSGDM(some), some, gradients(5))

    assert same(path(3), path(3))
    assert not same(path(3), path(4))


def test_a_resumed_run_draws_the_same_numbers():
    some, grads = params(), gradients(10)
    torch.manual_seed(0)
    optimizer = RandomlyScaledSGDM(some)
    run(optimizer, some, grads[:5])
    optimizer.eval()
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in some], torch.get_rng_state()], file)
    optimizer.train()
    expected = run(optimizer, some, grads[5:])
    file.seek(0)
    state, values, random_state = torch.load(file, weights_only=True)
    others = [nn.Parameter(value) for value in values]
    resumed = RandomlyScaledSGDM(others)
    resumed.load_state_dict(state)
    resumed.train()
    torch.set_rng_state(random_state)
    assert same(run(resumed, others, grads[5:]), expected)


def test_evaluation_is_at_the_average_with_the_momentums_memory():
    some, iterates = params(torch.float64), []
    optimizer = RandomlyScaledSGDM(some, momentum=0.8)
    for each in gradients(12, torch.float64):
        iterates.append(run(optimizer, some, [each])[0])
    weights = 0.8 ** torch.arange(11, -1, -1, dtype=torch.float64)
    optimizer.eval()
    expected = torch.tensordot(weights / weights.sum(), torch.stack(iterates), 1)
    torch.testing.assert_close(some[0].detach(), expected, rtol=0, atol=1e-12)


def test_it_compiles_and_neither_scale_nor_schedule_compiles_it_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(rs_sgdm.rs_sgdm, backend=counter, fullgraph=True)
    x, y = ([p.detach() for p in params(torch.float64)] for _ in range(2))
    states = [[torch.zeros_like(p) for p in x] for _ in range(4)]
    for t, g in enumerate(gradients(4, torch.float64), 1):
        tensors = {"lr": torch.tensor(0.1 / t, dtype=torch.float64), "t": torch.tensor(float(t), dtype=torch.float64)}
        compiled(x, g, states[0], states[1], b=0.9, wd=0.1, **tensors)
        rs_sgdm.rs_sgdm(y, g, states[2], states[3], lr=0.1 / t, t=t, b=0.9, wd=0.1)
    assert counter.frame_count == 1
    for a, b in zip([*x, *states[1]], [*y, *states[3]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_momentum_out_of_range_is_named():
    with pytest.raises(ConfigurationError, match="momentum"):
        RandomlyScaledSGDM(params(), momentum=1.0)
