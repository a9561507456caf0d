"""VRGD: the ratio of signal to noise by hand, what stays as it is, and the loop written by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import VRGD, ClipNorm
from lightrail_optimizers.transforms.vrgd import signal_to_noise

SHARDS = [(1.0, 1.0), (1.2, -1.0), (0.8, 1.0), (1.0, -1.0)]


def doubles(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, size=16):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


def closure_of(model, *batches):
    return Closure(lambda b: F.cross_entropy(model(b[0]), b[1]), list(model.parameters()), *batches)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def ratio_in_numpy(groups, gamma):
    """The paper's formula as it stands."""
    g = np.stack([np.asarray(each) for each in groups])
    mean = g.mean(0)
    q = mean**2 / ((g**2).mean(0) - mean**2)
    return np.clip(q / q.mean(), gamma, 1)


def test_the_ratio_by_hand():
    # q = (50, 0), of mean 25: (2, 0) within a layer, clipped to (1, 0.1).
    groups = [[g] for g in doubles(*SHARDS)]
    assert signal_to_noise(groups, 0.1)[0].tolist() == pytest.approx([1.0, 0.1], abs=1e-9)
    assert signal_to_noise(groups, 0.0)[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-9)


def test_a_step_by_hand():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    samples = torch.tensor([(1.0, 1.0), (1.2, -1.0), (0.8, 1.0), (1.0, 0.0)], dtype=torch.float64)
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [vrgd := VRGD(groups=4)])
    assert vrgd.logged() == {}
    optimizer.step(Closure(lambda b: (b @ w).mean(), [w], samples))
    # The second coordinate: mean 1/4, variance 3/4 - 1/16, q = 1/11; the mean of q is (50 + 1/11) / 2.
    assert (1 / 11) / ((50 + 1 / 11) / 2) < 0.1
    assert w.tolist() == pytest.approx([-1.0, -0.025], abs=1e-12)
    assert vrgd.logged() == {"mean_ratio": pytest.approx(0.55, abs=1e-12)}


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
def test_the_formula_in_numpy(k, gamma):
    torch.manual_seed(k)
    groups = [[torch.randn(6, 7, dtype=torch.float64) + 0.5, torch.randn(9, dtype=torch.float64)] for _ in range(k)]
    found = signal_to_noise(groups, gamma)
    for layer in range(2):
        expected = ratio_in_numpy([g[layer] for g in groups], gamma)
        torch.testing.assert_close(found[layer], torch.from_numpy(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_parts_leave_the_gradient_as_it_is(k, dtype):
    ours, plain = network(dtype), network(dtype)
    inputs, targets = batch(0, 3)
    repeated = inputs.to(dtype).repeat(k, 1), targets.repeat(k)
    TransformedOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), [VRGD(k)]).step(closure_of(ours, repeated))
    TransformedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1)).step(closure_of(plain, repeated))
    assert same(values(ours), values(plain))


def test_parts_that_are_equal_to_rounding_are_equal():
    torch.manual_seed(0)
    g = torch.randn(1000)
    eps = torch.finfo(torch.float32).eps
    groups = [[g * (1 + eps * torch.randint(-1, 2, (1000,)))] for _ in range(8)]
    assert signal_to_noise(groups, 0.1)[0].unique().tolist() == [1.0]


def test_an_entry_without_noise_is_not_all_of_the_mean():
    torch.manual_seed(0)
    noisy = [torch.randn(20, dtype=torch.float64) + 1 for _ in range(8)]
    sure = torch.full((1,), 0.3, dtype=torch.float64)
    unseen = torch.zeros(1, dtype=torch.float64)
    alone = signal_to_noise([[g] for g in noisy], 0.1)[0]
    together = signal_to_noise([[torch.cat([g, sure, unseen])] for g in noisy], 0.1)[0]
    assert together[-2:].tolist() == [1.0, 1.0]
    assert torch.equal(together[:-2], alone)


def test_layers_are_normalised_by_themselves():
    torch.manual_seed(0)
    a = [torch.randn(10, dtype=torch.float64) + 1 for _ in range(4)]
    b = [torch.randn(10, dtype=torch.float64) + 100 for _ in range(4)]
    both = signal_to_noise([[x, y] for x, y in zip(a, b, strict=True)], 0.1)
    assert torch.equal(both[0], signal_to_noise([[x] for x in a], 0.1)[0])
    assert torch.equal(both[1], signal_to_noise([[y] for y in b], 0.1)[0])
    scaled = signal_to_noise([[1e-6 * x] for x in a], 0.1)[0]
    torch.testing.assert_close(scaled, both[0], rtol=1e-9, atol=0)


def test_a_tensor_of_one_entry_keeps_its_gradient():
    found = signal_to_noise([[torch.tensor(v), torch.zeros(0)] for v in (1.0, -0.5, 2.0)], 0.1)
    assert found[0].item() == 1.0
    assert found[1].shape == (0,)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("count", [1, 2])
def test_equals_the_loop_written_by_hand(momentum, count):
    ours, theirs = network(), network()
    optimizer = TransformedOptimizer(torch.optim.AdamW(ours.parameters(), lr=0.01), [VRGD(4, 0.1, momentum)])
    params = list(theirs.parameters())
    other = torch.optim.AdamW(params, lr=0.01)
    average = [torch.zeros_like(p) for p in params]
    for step in range(3):
        window = [batch(10 * step + i) for i in range(count)]
        optimizer.step(closure_of(ours, *window))

        groups = []
        for j in range(4):
            for p in params:
                p.grad = None
            for inputs, targets in window:
                part = slice(4 * j, 4 * j + 4)
                (F.cross_entropy(theirs(inputs[part]), targets[part]) / count).backward()
            groups.append([p.grad for p in params])
        for p in params:
            p.grad = None
        for inputs, targets in window:
            (F.cross_entropy(theirs(inputs), targets) / count).backward()
        r = signal_to_noise(groups, 0.1)
        for i, p in enumerate(params):
            if momentum:
                average[i].lerp_(r[i], 1 - momentum)
                r[i] = average[i] / (1 - momentum ** (step + 1))
            assert p.grad is not None
            p.grad.mul_(r[i])
        other.step()
    assert same(values(ours), [p.detach() for p in params])


def test_the_average_over_steps_by_hand():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [VRGD(groups=4, gamma=0.1, momentum=0.9)])
    noisy = torch.tensor([(1.0, 1.0), (1.2, -1.0), (0.8, 1.0), (1.0, 0.0)], dtype=torch.float64)
    optimizer.step(Closure(lambda b: (b @ w).mean(), [w], noisy))
    assert w.tolist() == pytest.approx([-1.0, -0.025], abs=1e-12)  # corrected for its start at zero
    equal = torch.ones(4, 2, dtype=torch.float64)
    optimizer.step(Closure(lambda b: (b @ w).mean(), [w], equal))
    p = (0.9 * 0.1 * 0.1 + 0.1 * 1.0) / (1 - 0.9**2)
    assert w.tolist() == pytest.approx([-2.0, -0.025 - p], abs=1e-12)


def test_gamma_one_is_the_optimizer_alone_at_one_evaluation():
    ours, plain = network(), network()
    optimizer = TransformedOptimizer(torch.optim.AdamW(ours.parameters()), [VRGD(gamma=1)])
    other = TransformedOptimizer(torch.optim.AdamW(plain.parameters()))
    for step in range(3):
        closure = closure_of(ours, batch(step))
        optimizer.step(closure)
        assert closure.evaluations == 1
        other.step(closure_of(plain, batch(step)))
    assert same(values(ours), values(plain))
    traits = traits_of(VRGD, {"gamma": 1})
    assert traits.extra_evaluations == 0
    assert not traits.evaluates_again
    assert traits_of(VRGD, {"momentum": 0.9}).state == 1


def test_it_costs_one_evaluation():
    model = network()
    closure = closure_of(model, batch(0))
    TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [VRGD()]).step(closure)
    assert closure.evaluations == 2


def test_it_shrinks_what_stands_before_it():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    samples = torch.tensor([(1.0, 1.0), (1.2, -1.0), (0.8, 1.0), (1.0, 0.0)], dtype=torch.float64)
    optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [ClipNorm(0.1), VRGD(groups=4)])
    optimizer.step(Closure(lambda b: (b @ w).mean(), [w], samples))
    norm = (1 + 1 / 16) ** 0.5
    assert w.tolist() == pytest.approx([-0.1 / norm, -0.1 * 0.25 / norm * 0.1], abs=1e-12)


def test_a_resumed_average_goes_on():
    def made(model):
        return TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [VRGD(momentum=0.8)])

    whole, resumed = network(), network()
    optimizer = made(whole)
    for step in range(3):
        optimizer.step(closure_of(whole, batch(step)))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), values(whole)], file)
    file.seek(0)
    state, there = torch.load(file, weights_only=True)
    with torch.no_grad():
        torch._foreach_copy_(list(resumed.parameters()), there)
    again = made(resumed)
    again.load_state_dict(state)
    for step in range(3, 6):
        optimizer.step(closure_of(whole, batch(step)))
        again.step(closure_of(resumed, batch(step)))
    assert same(values(resumed), values(whole))


def test_missing_gradients_and_frozen_parameters():
    used, unused, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    params = [used, unused, frozen]
    samples = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    optimizer = TransformedOptimizer(torch.optim.SGD(params, lr=0.1), [VRGD(4, momentum=0.5)])
    for _ in range(2):
        optimizer.step(Closure(lambda b: (b @ (used * frozen)).mean(), params, samples))
    assert unused.grad is None
    assert frozen.grad is None
    assert unused.tolist() == frozen.tolist() == [1.0] * 3
    assert bool((used != 1).all())


def test_what_it_cannot_do_is_refused_by_name():
    model = network()
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), [VRGD(groups=8)])
    with pytest.raises(ClosureError, match="cannot be divided into 8 parts"):
        optimizer.step(closure_of(model, batch(0, 7)))
    with pytest.raises(ClosureError, match="evaluates the loss again"):
        optimizer.step()
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="vrgd does not take complex"):
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [VRGD(2)]).step(
            Closure(lambda b: (b * w).abs().sum(), [w], torch.ones(4, 2))
        )
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(ConfigurationError, match="vrgd does not take sparse"):
        TransformedOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), [VRGD(2)]).step(
            Closure(lambda b: table(b).sum(), list(table.parameters()), torch.arange(4))
        )


@pytest.mark.parametrize("options", [{"groups": 1}, {"gamma": -0.1}, {"gamma": 1.1}, {"momentum": 1.0}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        VRGD(**options)
