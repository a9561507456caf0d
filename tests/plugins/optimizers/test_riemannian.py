"""Riemannian Adam, AMSGrad, AdaGrad and SGD: by hand on a sphere, in Euclidean space, beside geoopt, and on a tree."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightrail_optimizers import RiemannianAdagrad, RiemannianAdam, RiemannianAMSGrad, RiemannianSGD

geoopt = pytest.importorskip("geoopt")

OURS = [RiemannianAdam, RiemannianAMSGrad, RiemannianAdagrad, RiemannianSGD]


def point(manifold, *values, dtype=torch.float64):
    return geoopt.ManifoldParameter(torch.tensor(values, dtype=dtype), manifold)


def on(manifold, *shape, seed=0, scale=1.0, dtype=torch.float64):
    """A random point."""
    start = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale
    return geoopt.ManifoldParameter(manifold.projx(start), manifold)


def path(make, p, steps, seed=1, scale=1.0):
    """Where it goes along gradients drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = make([p])
    for _ in range(steps):
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return p.detach().as_subclass(Tensor).clone(), optimizer


# On a sphere, by hand.


@pytest.mark.parametrize("make", [RiemannianAdam, RiemannianAMSGrad])
def test_the_first_step_on_a_sphere(make):
    """Its length is lr whatever the gradient is, along the geodesic; the normal part of the gradient is nothing."""
    x = point(geoopt.Sphere(), 1.0, 0.0, 0.0)
    x.grad = torch.tensor([5.0, 0.3, -0.4], dtype=torch.float64)
    make([x], lr=0.1, eps=0.0).step()
    expected = [math.cos(0.1), -0.6 * math.sin(0.1), 0.8 * math.sin(0.1)]
    assert x.tolist() == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx([0.9950041653, -0.0599000500, 0.0798667333], abs=1e-10)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_adam_on_a_sphere_is_its_equations(amsgrad, bias_correction):
    b1, b2, eps, lr = 0.8, 0.5, 1e-8, 0.2
    generator = torch.Generator().manual_seed(1)
    x, tau, v, v_hat = np.array([1.0, 0.0, 0.0]), np.zeros(3), 0.0, 0.0
    for t in range(1, 7):
        g = torch.randn(3, generator=generator, dtype=torch.float64).numpy() / t
        grad = g - (g @ x) * x
        m, v = b1 * tau + (1 - b1) * grad, b2 * v + (1 - b2) * grad @ grad
        v_hat = max(v_hat, v) if amsgrad else v
        c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1, 1)
        u = -lr * (m / c1) / (math.sqrt(v_hat / c2) + eps)
        length = np.linalg.norm(u)
        x = x * math.cos(length) + u * math.sin(length) / length
        tau = m - (m @ x) * x

    make = RiemannianAMSGrad if amsgrad else RiemannianAdam
    p = point(geoopt.Sphere(), 1.0, 0.0, 0.0)
    optimizer = make([p], lr=lr, betas=(b1, b2), eps=eps, bias_correction=bias_correction)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 7):
        p.grad = torch.randn(3, generator=generator, dtype=torch.float64) / t
        optimizer.step()
    assert p.tolist() == pytest.approx(x, abs=1e-9)
    kept = optimizer.state[p]
    assert kept["momentum"].tolist() == pytest.approx(tau, abs=1e-9)
    assert kept["second_moment"].tolist() == pytest.approx([v], abs=1e-9)


def test_adagrad_on_the_poincare_ball_is_its_equations():
    """The metric is ``λ² <u, v>`` with ``λ = 2 / (1 - ||x||²)``; from the center, geodesics are rays."""
    x = point(geoopt.PoincareBall(), 0.0, 0.0)
    optimizer = RiemannianAdagrad([x], lr=0.3, eps=1e-12)
    radius = 0.0
    total = 0.0
    for g in (4.0, 1.0, 2.0):
        factor = 2 / (1 - radius**2)
        total += (g / factor) ** 2
        radius = math.tanh(math.atanh(radius) + 0.3 * (g / factor) / math.sqrt(total) / 2)
        x.grad = torch.tensor([-0.6 * g, -0.8 * g], dtype=torch.float64)
        optimizer.step()
        assert x.tolist() == pytest.approx([0.6 * radius, 0.8 * radius], abs=1e-6)  # its curvature is single precision
    assert optimizer.state[x]["sum"].tolist() == pytest.approx([total], abs=1e-6)


def test_momentum_is_carried_along_the_sphere():
    """On a great circle, constant gradients along it are plain momentum on the angle."""
    x = point(geoopt.Sphere(), 1.0, 0.0)
    optimizer = RiemannianSGD([x], lr=0.1, momentum=0.9)
    angle = b = 0.0
    for _ in range(5):
        x.grad = torch.tensor([math.sin(angle), -math.cos(angle)], dtype=torch.float64)
        b = 0.9 * b * math.cos(0.1 * b) + 1  # the sphere's transport is a projection, which shortens
        optimizer.step()
        angle += 0.1 * b
        assert x.tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-9)


# In Euclidean space.

ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}
SGD: list[dict[str, Any]] = [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}]
EUCLIDEAN: list[Any] = [
    (lambda p: RiemannianAdam(p, **ADAM), lambda p: torch.optim.Adam(p, **ADAM)),
    (lambda p: RiemannianAMSGrad(p, **ADAM), lambda p: torch.optim.Adam(p, amsgrad=True, **ADAM)),
    (
        lambda p: RiemannianAdagrad(p, lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
    ),
    *((partial(RiemannianSGD, lr=0.05, **options), partial(torch.optim.SGD, lr=0.05, **options)) for options in SGD),
]


@pytest.mark.parametrize("as_point", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), EUCLIDEAN)
def test_where_each_coordinate_is_a_factor_it_is_the_euclidean_method(ours, theirs, as_point):
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = geoopt.ManifoldParameter(start.clone(), geoopt.Euclidean()) if as_point else nn.Parameter(start.clone())
    found, _ = path(ours, p, 8)
    expected, _ = path(theirs, nn.Parameter(start.clone()), 8)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("make", [RiemannianAdam, RiemannianAMSGrad])
def test_without_bias_correction_in_euclidean_space(make, foreach):
    p = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    p.grad = torch.tensor([2.0, -0.5], dtype=torch.float64)
    make([p], lr=0.1, betas=(0.9, 0.99), eps=1e-8, bias_correction=False, foreach=foreach).step()
    assert p.tolist() == pytest.approx([0.9, 1.1], abs=1e-6)  # lr 0.1 g / sqrt(0.01 g²)


# Beside geoopt.

MANIFOLDS = {
    "sphere": (geoopt.Sphere, (4, 3)),
    "ball": (geoopt.PoincareBall, (4, 3)),
    "stiefel": (geoopt.EuclideanStiefel, (2, 5, 3)),
    "canonical": (geoopt.CanonicalStiefel, (5, 3)),
    "lorentz": (geoopt.Lorentz, (4, 3)),
    "positive": (geoopt.SymmetricPositiveDefinite, (2, 3, 3)),
    "product": (lambda: geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.Euclidean(), 2)), (4, 5)),
}
PEERS = [
    (RiemannianAdam, lambda p, **o: geoopt.optim.RiemannianAdam(p, **o)),
    (RiemannianAMSGrad, lambda p, **o: geoopt.optim.RiemannianAdam(p, amsgrad=True, **o)),
    (RiemannianSGD, lambda p, **o: geoopt.optim.RiemannianSGD(p, **o)),
]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize(("ours", "theirs"), PEERS)
def test_by_retraction_it_goes_where_geoopt_goes(ours, theirs, name, decay):
    make, shape = MANIFOLDS[name]
    manifold = make()
    options = {"lr": 0.02, "weight_decay": decay}
    found, _ = path(lambda p: ours(p, retraction=True, stabilize_every=None, **options), on(manifold, *shape), 5)
    expected, _ = path(lambda p: theirs(p, **options), on(manifold, *shape), 5)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"weight_decay": 0.5}, {"weight_decay": 0.5, "maximize": True}])
@pytest.mark.parametrize("make", OURS)
def test_the_gradient_is_left_as_it_is(make, options):
    params = [on(geoopt.PoincareBall(), 2, 3, scale=0.1), nn.Parameter(torch.ones(2, 3, dtype=torch.float64))]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    make(params, lr=0.1, **options).step()
    assert all(bool((p.grad == 0.5).all()) for p in params)


@pytest.mark.parametrize("make", OURS)
def test_decay_pulls_to_the_center_of_the_ball_and_does_nothing_on_a_sphere(make):
    inside, around = point(geoopt.PoincareBall(), 0.3, 0.4), point(geoopt.Sphere(), 0.6, 0.8)
    optimizer = make([inside, around], lr=0.01, weight_decay=0.5, **({} if make is RiemannianSGD else {"eps": 1e-3}))
    for p in (inside, around):
        p.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    assert float(inside.detach().norm()) < 0.5 - 1e-4
    assert around.tolist() == pytest.approx([0.6, 0.8], abs=1e-12)


# A tree.


def tree(nodes):
    """Which nodes of a binary tree are related, one the other's ancestor."""
    related = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node in range(1, nodes):
        ancestor = node
        while ancestor:
            ancestor = (ancestor - 1) // 2
            related[node, ancestor] = related[ancestor, node] = True
    return related


def loss_of_a_tree(make, nodes=15, steps=100):
    """Of its embedding in the ball after training: relatives are to be nearer than all who are not related.

    Nickel and Kiela, 2017, "Poincaré Embeddings for Learning Hierarchical Representations", arXiv:1705.08039, Eq. 5.
    """
    related, ball = tree(nodes), geoopt.PoincareBall()
    u, v = related.triu().nonzero(as_tuple=True)
    u, v = torch.cat([u, v]), torch.cat([v, u])
    x = on(ball, nodes, 2, scale=1e-3)
    optimizer, after = make(x)
    for _ in range(steps):
        optimizer.zero_grad()
        distances = ball.dist(x[:, None], x[None])
        strangers = torch.where(related | torch.eye(nodes, dtype=torch.bool), -math.inf, -distances).logsumexp(1)
        loss = (distances[u, v] + torch.logaddexp(strangers[u], -distances[u, v])).mean()
        loss.backward()
        optimizer.step()
        after(x)
    return float(loss.detach())


def test_a_tree_embeds_better_than_by_projected_euclidean_descent():
    def projected(lr):
        return lambda x: (torch.optim.SGD([x], lr=lr), lambda x: x.data.copy_(x.manifold.projx(x.data)))

    def riemannian(make, lr):
        return lambda x: (make([x], lr=lr), lambda x: None)

    euclidean = min(loss_of_a_tree(projected(lr)) for lr in (0.1, 0.3, 1.0))
    for make, lr in ((RiemannianAdam, 0.1), (RiemannianAMSGrad, 0.1), (RiemannianAdagrad, 0.3)):
        assert loss_of_a_tree(riemannian(make, lr)) < euclidean / 2, make.__name__
