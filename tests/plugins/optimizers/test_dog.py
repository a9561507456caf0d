"""DoG and LDoG: numbers by hand, the published rule in numpy, invariance to the scale of the loss."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lightrail.errors import ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers import DoG, LDoG


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def step(optimizer, *pairs):
    for p, g in pairs:
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).reshape(p.shape)
    optimizer.step()


def numpy_dog(x0, gradients, *, per_tensor, reps_rel=1e-6, eps=1e-8, wd=0.0, gamma=8.0, lr=1.0):
    """The published rule over lists of arrays; returns the last iterate and its average."""
    x, average = [a.copy() for a in x0], [a.copy() for a in x0]

    def norms(arrays):
        each = np.array([np.linalg.norm(a) for a in arrays])
        return each if per_tensor else np.full(len(arrays), np.linalg.norm(each))

    rbar, total = reps_rel * (1 + norms(x)), np.full(len(x), eps)
    for t, g in enumerate(gradients, 1):
        g = [g_i + wd * x_i for g_i, x_i in zip(g, x, strict=True)]
        rbar = np.maximum(rbar, norms([a - b for a, b in zip(x, x0, strict=True)]))
        total = total + norms(g) ** 2
        x = [x_i - lr * r / np.sqrt(s) * g_i for x_i, g_i, r, s in zip(x, g, rbar, total, strict=True)]
        c = (1 + gamma) / (t + gamma)
        average = [(1 - c) * a + c * x_i for a, x_i in zip(average, x, strict=True)]
    return x, average


def test_two_steps_by_hand():
    w = nn.Parameter(doubles(1.0, -2.0))
    optimizer = DoG([w])
    step(optimizer, (w, [0.5, -1.0]))
    torch.testing.assert_close(w.detach(), doubles(0.9999985528, -1.9999971056), rtol=0, atol=1e-10)
    length = 1e-6 * (1 + 5**0.5) * 1.25**0.5 / (1.25 + 1e-8) ** 0.5
    assert float(torch.linalg.vector_norm(w.detach() - doubles(1.0, -2.0))) == pytest.approx(length, abs=1e-15)
    before = w.detach().clone()
    step(optimizer, (w, [1.0, 0.25]))
    torch.testing.assert_close(w.detach(), doubles(0.9999964248, -1.9999976376), rtol=0, atol=1e-10)
    assert (before - w.detach())[0].item() == pytest.approx(2.128025e-6, rel=1e-6)


@pytest.mark.parametrize("method", [DoG, LDoG])
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_it_is_the_published_rule(method, wd):
    numbers = np.random.default_rng(0)
    x0 = [numbers.normal(size=shape) for shape in [(4, 3), (5,), (), (2, 2)]]
    gradients = [[numbers.normal(size=a.shape) for a in x0] for _ in range(15)]
    params = [nn.Parameter(torch.tensor(a)) for a in x0]
    optimizer = method(params, reps_rel=0.03, weight_decay=wd)
    for g in gradients:
        step(optimizer, *zip(params, g, strict=True))
    x, average = numpy_dog(x0, gradients, per_tensor=method is LDoG, reps_rel=0.03, wd=wd)
    for p, expected in zip(params, x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-12)
    optimizer.eval()
    for p, expected in zip(params, average, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_the_distance_is_the_greatest_and_not_the_last():
    w = nn.Parameter(doubles(0.0))
    optimizer = DoG([w], reps_rel=1.0)
    for g in (-1.0, 3.0, 1.0):  # out to 1, and back through 0
        step(optimizer, (w, [g]))
    assert optimizer.param_groups[0]["rbar"][0].item() == pytest.approx(1.0, rel=1e-7)


def test_groups_have_step_sizes_of_their_own_in_dog():
    a, b = nn.Parameter(doubles(0.0)), nn.Parameter(doubles(0.0))
    together = DoG([{"params": [a]}, {"params": [b]}], reps_rel=0.1)
    step(together, (a, [100.0]), (b, [1.0]))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    c, d = nn.Parameter(doubles(0.0)), nn.Parameter(doubles(0.0))
    step(DoG([c, d], reps_rel=0.1), (c, [100.0]), (d, [1.0]))
    assert c.item() == pytest.approx(100 * d.item(), rel=1e-9)


@pytest.mark.parametrize("method", [DoG, LDoG])
def test_the_first_step_size_may_be_given(method):
    params = [nn.Parameter(doubles(1.0, -2.0)), nn.Parameter(doubles(3.0))]
    optimizer = method(params, init_eta=0.01)
    step(optimizer, (params[0], [0.5, -1.0]), (params[1], [2.0]))
    torch.testing.assert_close(params[0].detach(), doubles(0.995, -1.99), rtol=0, atol=1e-12)
    torch.testing.assert_close(params[1].detach(), doubles(2.98), rtol=0, atol=1e-12)
    # The published code has a distance of 0 at that step, and of eta ||g|| at the next.
    norm, sum_squares = (1.25**0.5, 1.25 + 1.0) if method is LDoG else (5.25**0.5, 5.25 + 1.0)
    step(optimizer, (params[0], [1.0, 0.0]), (params[1], [0.0]))
    assert params[0][0].item() == pytest.approx(0.995 - 0.01 * norm / sum_squares**0.5, abs=1e-9)


def test_a_gradient_of_zero_at_the_start_does_no_harm():
    for init_eta in (None, 0.1):
        w = nn.Parameter(doubles(1.0))
        optimizer = DoG([w], init_eta=init_eta)
        for g in (0.0, 0.0, 1.0):
            step(optimizer, (w, [g]))
        assert 0 < w.item() < 1


def logistic():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    y = (x @ doubles(1.0, -2.0, 0.5, 0.0, 1.0) + 0.3 * torch.randn(64, generator=generator).double() > 0).double()
    return x, y


@pytest.mark.parametrize("method", [DoG, LDoG])
def test_the_scale_of_the_loss_does_not_matter(method):
    x, y = logistic()
    ends = []
    for scale in (1e-3, 1.0, 1e3):
        w = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        b = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = method([w, b], eps=1e-16)
        for _ in range(300):
            optimizer.zero_grad()
            (scale * F.binary_cross_entropy_with_logits(x @ w + b, y)).backward()
            optimizer.step()
        ends.append(F.binary_cross_entropy_with_logits(x @ w + b, y).item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-3) == pytest.approx(ends[2], rel=1e-3)
    assert ends[1] < 0.3


def test_averaging_helps_where_gradients_are_noisy():
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.ones(20, dtype=torch.float64))
    optimizer, last = DoG([w]), 0.0
    for t in range(600):
        step(optimizer, (w, w.detach() + torch.randn(20, generator=generator).double()))
        last += float(w.detach().norm()) / 50 if t >= 550 else 0.0
    optimizer.eval()
    assert float(w.detach().norm()) < 0.75 * last


def test_missing_gradients_stand_aside():
    a, b, never = (nn.Parameter(doubles(1.0, 2.0)) for _ in range(3))
    for method in (DoG, LDoG):
        optimizer = method([a, b, never], reps_rel=0.1)
        step(optimizer, (a, [1.0, 0.0]), (b, None))
        b_before, a_before = b.detach().clone(), a.detach().clone()
        step(optimizer, (a, None), (b, [1.0, 1.0]))
        assert torch.equal(a, a_before)
        assert not torch.equal(b, b_before)
        step(optimizer, (a, None), (b, None))
        optimizer.eval()
        assert never.tolist() == [1.0, 2.0]
        optimizer.train()
        with torch.no_grad():
            for p in (a, b):
                p.copy_(doubles(1.0, 2.0))


def test_a_tensor_that_joins_late_has_its_own_distance_in_ldog():
    a, b = nn.Parameter(doubles(3.0)), nn.Parameter(doubles(1.0))
    optimizer = LDoG([a, b], reps_rel=0.1)
    for _ in range(3):
        step(optimizer, (a, [1.0]), (b, None))
    step(optimizer, (a, None), (b, [5.0]))
    assert b.item() == pytest.approx(1 - 0.1 * 2, abs=1e-9)


@pytest.mark.parametrize("method", [DoG, LDoG])
def test_a_schedule_is_refused_by_name(method):
    w = nn.Parameter(torch.ones(2))
    optimizer = method([w])
    LambdaLR(optimizer, lambda step: 0.5)
    w.grad = torch.ones(2)
    with pytest.raises(ConfigurationError, match="sets its own step size"):
        optimizer.step()


@pytest.mark.parametrize("method", [DoG, LDoG])
def test_without_the_average_there_is_one_point(method):
    w = nn.Parameter(torch.ones(2))
    optimizer = method([w], average=False)
    step(optimizer, (w, [1.0, 2.0]))
    here = w.detach().clone()
    optimizer.eval()
    assert torch.equal(w, here)
    assert "average" not in optimizer.state[w]
    traits = traits_of(method, {"average": False})
    assert not traits.has_evaluation_point
    assert traits.state == 1
    assert traits_of(method, {"average": True}) == method.traits
    assert traits.rule == method.traits.rule


@pytest.mark.parametrize("method", [DoG, LDoG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_keep_their_precision_through_a_checkpoint(method, dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(6, 2, generator=generator).to(dtype) for _ in range(8)]
    w = nn.Parameter(torch.ones(6, 2, dtype=dtype))
    optimizer = method([w], reps_rel=0.05)
    for g in gradients[:4]:
        step(optimizer, (w, g))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    v = nn.Parameter(w.detach().clone())
    resumed = method([v])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    held = copy.deepcopy(optimizer.state_dict()["param_groups"])
    state = optimizer.state_dict()
    for g in gradients[4:]:
        step(optimizer, (w, g))
        step(resumed, (v, g))
        assert torch.equal(w, v)
    assert str(state["param_groups"]) == str(held)  # a state in memory does not go on with the run


def test_sums_grow_on_where_the_parameters_precision_ends():
    w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = DoG([w], reps_rel=0.01)
    for _ in range(1000):
        step(optimizer, (w, [1.0, -1.0]))
    assert optimizer.param_groups[0]["sum_squares"][0].item() == pytest.approx(2000, rel=1e-6)


def test_the_sums_are_the_same_tensor_by_tensor_on_other_devices(monkeypatch):
    """Off the CPU, one call takes all step sizes as tensors: here that call, on the CPU."""
    from lightrail_optimizers import dog

    x = [torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor(1.0)]
    y = [x_i.clone() for x_i in x]
    g = [torch.full_like(x_i, 0.5) for x_i in x]
    eta = list(doubles(0.1, 0.2, 0.3).unbind())
    dog._descend(x, g, eta)
    torch._foreach_sub_(y, torch._foreach_mul(g, eta))
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-2 if a.dtype is torch.bfloat16 else 1e-6)
        assert b.dtype == a.dtype


@pytest.mark.parametrize("options", [{"reps_rel": 0.0}, {"eps": 0.0}, {"lr": -1.0}, {"init_eta": 0.0}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DoG([nn.Parameter(torch.ones(1))], **options)
