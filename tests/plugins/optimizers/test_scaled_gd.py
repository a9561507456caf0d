"""ScaledGD: steps by hand, invariance to the choice of factors, speed on ill-conditioned matrices, and the pairing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightrail import Closure
from lightrail.errors import ConfigurationError
from lightrail_optimizers import ScaledGD
from lightrail_optimizers.scaled_gd import scaled_gradient

CLOSE = {"rtol": 0, "atol": 1e-9}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(m=5, n=4, k=2, product="LRt", seed=0):
    left, right = normal(m, k, seed=seed), normal(n, k, seed=seed + 1)
    return nn.Parameter(left), nn.Parameter(right.T.contiguous() if product == "LR" else right)


def multiplied(left, right, product):
    return left @ (right if product == "LR" else right.T)


def step_towards(optimizer, target, left, right, product="LRt"):
    loss = lambda: (multiplied(left, right, product) - target).square().sum() / 2  # noqa: E731
    return optimizer.step(Closure(loss, [left, right]))


# The update.


@pytest.mark.parametrize("product", ["LRt", "LR"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_pair_by_hand(product, damping):
    left, right = factors(product=product)
    target = normal(5, 4, seed=9)
    a, b = left.detach().numpy().copy(), right.detach().numpy().copy()
    b = b.T if product == "LR" else b
    optimizer = ScaledGD([("left", left), ("right", right)], lr=0.2, damping=damping)
    for _ in range(3):
        step_towards(optimizer, target, left, right, product)
        residual = a @ b.T - target.numpy()
        # Both from the old factors.
        a, b = (
            a - 0.2 * residual @ b @ np.linalg.inv(b.T @ b + damping * np.eye(2)),
            b - 0.2 * residual.T @ a @ np.linalg.inv(a.T @ a + damping * np.eye(2)),
        )
        np.testing.assert_allclose(left.detach().numpy(), a, rtol=0, atol=1e-9)
        np.testing.assert_allclose(right.detach().numpy(), b.T if product == "LR" else b, rtol=0, atol=1e-9)


def test_a_single_factor_by_hand():
    factor, g = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)), normal(3, 2)
    factor.grad = g.clone()
    before = factor.detach().clone()
    ScaledGD([("x", factor)], lr=0.5, damping=1.0, symmetric=["x"]).step()
    # The Gram matrix is diag(1, 4), plus one.
    torch.testing.assert_close(factor.detach(), before - 0.5 * g / torch.tensor([2.0, 5.0]), **CLOSE)


def test_single_precision_does_not_lose_small_singular_values_to_a_gram_matrix():
    turn = torch.linalg.qr(normal(2, 2, seed=5)).Q
    r = torch.linalg.qr(normal(30, 2)).Q @ torch.diag(torch.tensor([1.0, 3e-4], dtype=torch.float64)) @ turn
    g = (normal(7, 30, seed=3) @ r).float().double()
    r = r.float().double()
    exact = g @ torch.linalg.inv(r.T @ r + 1e-12 * torch.eye(2, dtype=torch.float64))
    error = scaled_gradient(g.float(), r.float(), 1e-12).double() - exact
    # An entry of the Gram matrix ends at 1e-7; the square of the small singular value is 9e-8.
    assert error.norm() < 0.01 * exact.norm()


def test_a_change_of_factors_leaves_the_product_on_its_path():
    change = torch.tensor([[3.0, 1.0], [-2.0, 0.1]], dtype=torch.float64)
    target, paths = normal(5, 4, seed=9), []
    for q in (torch.eye(2, dtype=torch.float64), change):
        left, right = factors()
        with torch.no_grad():
            left.copy_(left @ q)
            right.copy_(right @ torch.linalg.inv(q).T)
        optimizer = ScaledGD([("left", left), ("right", right)], lr=0.3, damping=0.0)
        path = []
        for _ in range(5):
            step_towards(optimizer, target, left, right)
            path.append((left @ right.T).detach())
        paths.append(torch.stack(path))
    torch.testing.assert_close(*paths, **CLOSE)


def test_maximize_ascends():
    moved = []
    for maximize in (False, True):
        left, right = factors()
        left.grad, right.grad = normal(5, 2, seed=4), normal(4, 2, seed=5)
        start = left.detach().clone()
        ScaledGD([("left", left), ("right", right)], maximize=maximize).step()
        moved.append(left.detach() - start)
    torch.testing.assert_close(moved[0], -moved[1], **CLOSE)


# What the paper claims.


def sensing(condition, rank, scaled, steps=300, n=12, true_rank=3):
    """The relative error in ``F Fᵀ`` from Gaussian measurements of it, from a small random start of too high a rank."""
    basis = torch.linalg.qr(normal(n, true_rank, seed=1)).Q
    values = torch.logspace(0, -float(np.log10(condition)), true_rank, dtype=torch.float64)
    target = basis @ torch.diag(values) @ basis.T
    measures = normal(800, n, n, seed=2)
    measures = (measures + measures.transpose(1, 2)) / (2 * 800) ** 0.5
    observed = (measures * target).sum((1, 2))
    factor = nn.Parameter(1e-4 * normal(n, rank, seed=3))
    params = [("factor", factor)]
    damping = float(values[-1]) / 50
    optimizer = ScaledGD(params, 0.3, damping, symmetric=["factor"]) if scaled else torch.optim.SGD([factor], 0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        (((measures * (factor @ factor.T)).sum((1, 2)) - observed).square().sum() / 4).backward()
        optimizer.step()
    return float((factor.detach() @ factor.detach().T - target).norm() / target.norm())


def test_its_speed_does_not_depend_on_the_condition_number_where_that_of_gradient_descent_does():
    assert max(sensing(condition, rank=3, scaled=True) for condition in (2, 20, 1000)) < 1e-12
    assert max(sensing(condition, rank=5, scaled=True) for condition in (2, 20, 1000)) < 1e-4
    assert sensing(2, rank=3, scaled=False) < 1e-12
    assert min(sensing(condition, rank=rank, scaled=False) for condition in (100, 1000) for rank in (3, 5)) > 5e-3


def test_pairs_converge_at_one_rate_whatever_the_condition_number():
    u, v = torch.linalg.qr(normal(8, 3, seed=1)).Q, torch.linalg.qr(normal(6, 3, seed=2)).Q
    for condition in (1.0, 1e2, 1e4):
        root = torch.logspace(0, -float(np.log10(condition)) / 2, 3, dtype=torch.float64)
        target = (u * root) @ (v * root).T
        left = nn.Parameter(u * root * 1.2)
        right = nn.Parameter(v * root + 0.1 * root * normal(6, 3, seed=3))
        optimizer = ScaledGD([("left", left), ("right", right)], lr=0.5, damping=0.0)
        first = step_towards(optimizer, target, left, right)
        for _ in range(24):
            last = step_towards(optimizer, target, left, right)
        assert (last / first) ** 0.5 < 0.55**24


# What it refuses.


def test_a_model_without_factors_is_refused_at_the_first_step():
    optimizer = ScaledGD(nn.Linear(3, 2).named_parameters())
    with pytest.raises(ConfigurationError, match="no factors") as error:
        optimizer.step()
    assert "weight" in error.value.found
    assert "optimizer.pairs" in error.value.remedy
    lone = ScaledGD([("lora_A", nn.Parameter(normal(2, 3)))])
    with pytest.raises(ConfigurationError, match="no factors"):
        lone.step()


def test_dependent_columns_need_damping():
    left, right = factors()
    with torch.no_grad():
        right[:, 1] = right[:, 0]
    left.grad = torch.ones_like(left)
    with pytest.raises(ConfigurationError, match="dependent columns"):
        ScaledGD([("left", left), ("right", right)], damping=0.0).step()


def test_wrong_options():
    named = nn.Linear(3, 2).named_parameters
    refused: list[dict[str, Any]] = [
        {"lr": -1.0},
        {"damping": -1.0},
        {"pairs": [["*.a", "b"]]},
        {"pairs": [["a"]]},
        {"product": "RL"},
        {"adamw_betas": (0.9, 1.0)},
        {"adamw_eps": 0.0},
    ]
    for options in refused:
        with pytest.raises(ConfigurationError):
            ScaledGD(named(), **options)
    with pytest.raises(ConfigurationError, match="named parameters"):
        ScaledGD(nn.Linear(3, 2).parameters())
