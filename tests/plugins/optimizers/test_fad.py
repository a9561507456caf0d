# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
"""FAD: its objective's gradient on a quadratic, its reductions, and the loop written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrail import Closure, TransformedOptimizer
from lightrail.errors import ClosureError, ConfigurationError
from lightrail.traits import traits_of
from lightrail_optimizers.transforms.fad import FAD, fad_gradient
from lightrail_optimizers.transforms.sam import SAM

CURVATURES = torch.tensor([1.0, 4.0], dtype=torch.float64)


def quadratic():
    """``½ (x² + 4 y²)`` at (1, 1)."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    return w, Closure(lambda: (CURVATURES * w**2).sum() / 2, [w])


def gradient_after(transform):
    w, closure = quadratic()
    closure()
    with torch.no_grad():
        transform.before_step([w], closure)
    return w.grad


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def window(step, count):
    torch.manual_seed(100 + step)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def train(model, transforms, count=1, steps=4):
    optimizer = TransformedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), transforms)
    spent = 0.0
    for step in range(steps):
        batches = window(step, count)
        torch.manual_seed(step)
        closure = Closure(loss_of(model), list(model.parameters()), *batches, module=model)
        optimizer.step(closure)
        spent += closure.evaluations
    return model, spent / steps


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.0, 0.3), (0.8, 2.0)])
@pytest.mark.parametrize(("rho", "rho_prime"), [(0.2, 0.2), (0.2, 0.05), (0.1, 0.4)])
def test_the_gradient_by_numpy(alpha, beta, rho, rho_prime):
    h, x = np.array([1.0, 4.0]), np.ones(2)
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    g0 = h * x
    g1 = h * (x + rho_prime * unit(g0))
    y = x + rho * unit(g1 - g0)
    g2 = h * y
    g3 = h * (y + rho_prime * unit(g2))
    expected = g0 + beta * (alpha * (g1 - g0) + (1 - alpha) * rho / rho_prime * (g3 - g2))
    found = gradient_after(FAD(rho=rho, rho_prime=rho_prime, alpha=alpha, beta=beta))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rho_prime", [0.01, 0.2, None])
def test_on_a_quadratic_it_is_the_gradient_of_its_objective(rho_prime):
    """The worst points held fixed as displacements, as the envelope theorem allows."""
    rho, alpha, beta = 0.2, 0.3, 0.7
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    g = CURVATURES * x.detach()
    e = (rho if rho_prime is None else rho_prime) * g / g.norm()
    h = CURVATURES * g
    d = rho * h / h.norm()
    loss = lambda point: (CURVATURES * point**2).sum() / 2  # noqa: E731
    zeroth, first = loss(x + e) - loss(x), rho * (CURVATURES * (x + d)).norm()
    (expected,) = torch.autograd.grad(loss(x) + beta * (alpha * zeroth + (1 - alpha) * first), x)
    transform = FAD(rho=rho, rho_prime=rho_prime, alpha=alpha, beta=beta)
    torch.testing.assert_close(gradient_after(transform), expected, rtol=0, atol=1e-12)
    assert transform.logged()["sharpness"] == pytest.approx(zeroth.item(), rel=1e-12)
    assert transform.logged()["flatness"] == pytest.approx(first.item(), rel=1e-12)
    assert transform.logged()["gradient_norm"] == pytest.approx(17**0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_equals_the_loop_written_by_hand(count):
    rho, rho_prime, alpha, beta = 0.3, 0.1, 0.25, 0.8
    model = network(nn.Dropout(0.3))
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)

    def gradient(step, points=None):
        torch.manual_seed(step)
        origin = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, point in zip(params, points or origin, strict=True):
                p.copy_(point)
        optimizer.zero_grad()
        for batch in batches:
            (loss_of(model)(batch) / count).backward()
        with torch.no_grad():
            for p, x in zip(params, origin, strict=True):
                p.copy_(x)
        return [p.grad.clone() for p in params]

    def towards(points, direction, radius):
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in direction]))
        return [p.detach() + (radius / norm) * d for p, d in zip(points, direction, strict=True)]

    for step in range(4):
        batches = window(step, count)
        g0 = gradient(step)
        g1 = gradient(step, towards(params, g0, rho_prime))
        y = towards(params, [a - b for a, b in zip(g1, g0, strict=True)], rho)
        g2 = gradient(step, y)
        g3 = gradient(step, towards(y, g2, rho_prime))
        for p, a, b, c, d in zip(params, g0, g1, g2, g3, strict=True):
            p.grad = a.lerp(b, beta * alpha).add_(d - c, alpha=beta * (1 - alpha) * (rho / rho_prime))
        optimizer.step()

    transform = FAD(rho=rho, rho_prime=rho_prime, alpha=alpha, beta=beta)
    assert same(train(network(nn.Dropout(0.3)), [transform], count)[0], model)


def test_without_strength_it_is_the_optimizer_alone():
    (ours, spent), (plain, _) = train(network(), [FAD(beta=0.0)], 2), train(network(), [], 2)
    assert same(ours, plain)
    assert spent == 1
    assert traits_of(FAD, {"beta": 0.0}).extra_evaluations == 0
    assert not traits_of(FAD, {"beta": 0.0}).evaluates_again


@pytest.mark.parametrize("adaptive", [False, True])
def test_without_first_order_flatness_it_is_sam(adaptive):
    ours, spent = train(network(), [FAD(rho=0.2, alpha=1.0, beta=1.0, adaptive=adaptive)], 2)
    assert same(ours, train(network(), [SAM(rho=0.2, adaptive=adaptive)], 2)[0])
    assert spent == 2
    assert traits_of(FAD, {"alpha": 1.0}).extra_evaluations == 1


def test_half_of_the_strength_is_half_of_the_way_to_sam():
    start, whole = torch.tensor([1.0, 4.0], dtype=torch.float64), gradient_after(SAM(rho=0.2))
    half = gradient_after(FAD(rho=0.2, alpha=1.0, beta=0.5))
    torch.testing.assert_close(half, (start + whole) / 2, rtol=0, atol=1e-12)


def test_with_first_order_flatness_alone_the_loss_nearby_has_no_say():
    g = [[torch.randn(3, dtype=torch.float64)] for _ in range(4)]
    (found,) = fad_gradient(*g, alpha=0.0, beta=0.5, c=4.0)
    torch.testing.assert_close(found, g[0][0] + 2 * (g[3][0] - g[2][0]), rtol=0, atol=1e-12)


def test_four_evaluations_a_step():
    assert train(network(), [FAD()], 3)[1] == 4
    assert traits_of(FAD).extra_evaluations == 3


def test_options_out_of_range_and_a_plain_closure():
    for options in ({"rho": 0.0}, {"rho_prime": 0.0}, {"alpha": -0.1}, {"beta": -1.0}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            FAD(**options)
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    with pytest.raises(ClosureError, match="evaluates the loss again"):
        TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [FAD()]).step()
