"""Which noise goes with which data."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail_generation.tasks.couplings import (
    couple,
    couple_by_class,
    exact_coupling,
    sampled_coupling,
    sinkhorn_plan,
    squared_distances,
    stable_coupling,
)

KINDS = ("exact", "stable", "sinkhorn")


def drawn(count, features=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, features, generator=generator) * 0.5 + torch.tensor([1.0] + [0.0] * (features - 1))
    return x0, torch.randn(count, features, generator=generator), torch.rand(count, generator=generator)


def mean_cost(x0, z):
    return float((x0 - z).square().sum(1).mean())


def test_distances_are_those_of_pairs_of_any_shape():
    x0, z = torch.randn(4, 1, 3, 2), torch.randn(4, 1, 3, 2)
    direct = (x0[:, None].double() - z[None].double()).square().flatten(2).sum(-1)
    assert torch.allclose(squared_distances(x0, z), direct, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "stable"])
def test_assignments_use_every_noise_once(kind):
    x0, z, u = drawn(32)
    coupled = couple(x0, z, kind, u)
    assert sorted(coupled[:, 0].tolist()) == sorted(z[:, 0].tolist())
    assert not torch.equal(coupled, z)


def test_the_plan_has_uniform_marginals():
    x0, z, _ = drawn(32)
    plan = sinkhorn_plan(squared_distances(x0, z), 0.05)
    assert float((plan.sum(0) - 1 / 32).abs().max()) < 1e-7
    assert float((plan.sum(1) - 1 / 32).abs().max()) < 1e-7
    assert bool((plan >= 0).all())


def test_drawing_from_the_plan_gives_its_rows():
    x0, z, _ = drawn(4)
    plan = sinkhorn_plan(squared_distances(x0, z), 0.5)
    places = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    counts = torch.zeros_like(plan)
    for u in places[::20]:
        counts[torch.arange(4), sampled_coupling(plan, u.expand(4))] += 1
    assert torch.allclose(counts / counts.sum(1, keepdim=True), 4 * plan, atol=2e-3)


def test_drawing_never_leaves_the_batch():
    plan = torch.full((3, 3), 1 / 9, dtype=torch.float64)
    assert sampled_coupling(plan, torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_stays_as_it_is(kind):
    x0, z, u = drawn(1)
    assert torch.equal(couple(x0, z, kind, u), z)


@pytest.mark.parametrize("count", [2, 5, 64])
def test_on_the_line_the_exact_coupling_sorts(count):
    x0, z, u = drawn(count, features=1, seed=count)
    coupled = couple(x0, z, "exact", u)
    order = x0[:, 0].argsort()
    assert torch.equal(coupled[order, 0], z[:, 0].sort().values)


def test_the_exact_coupling_is_the_cheapest_of_all():
    x0, z, _ = drawn(6, seed=3)
    cost = squared_distances(x0, z)
    rows = torch.arange(6)
    cheapest = min(float(cost[rows, torch.tensor(p)].sum()) for p in itertools.permutations(range(6)))
    assert float(cost[rows, exact_coupling(cost)].sum()) == pytest.approx(cheapest, abs=1e-12)


def test_in_a_stable_coupling_no_two_would_rather_have_each_other():
    x0, z, _ = drawn(40, seed=4)
    cost = squared_distances(x0, z)
    found = stable_coupling(cost)
    own = cost[torch.arange(40), found]
    of_noise = torch.empty_like(own)
    of_noise[found] = own
    assert not bool(((cost < own[:, None]) & (cost < of_noise[None])).any())
    # With costs that both sides share, that is: the nearest pair of all, then the nearest of the rest, and so on.
    left, greedy = cost.clone(), torch.empty(40, dtype=torch.int64)
    for _ in range(40):
        row, column = divmod(int(left.argmin()), 40)
        greedy[row] = column
        left[row], left[:, column] = torch.inf, torch.inf
    assert torch.equal(found, greedy)


def test_every_coupling_is_cheaper_than_none_and_the_exact_one_the_cheapest():
    x0, z, u = drawn(128)
    costs = {kind: mean_cost(x0, couple(x0, z, kind, u)) for kind in KINDS}
    # The data lie a distance of 1 away, and half as wide as the noise: no coupling costs less than 1 + 2 · 0.5².
    assert 1.5 - 0.3 < costs["exact"] < costs["stable"] < 0.8 * mean_cost(x0, z)
    assert costs["sinkhorn"] < 0.8 * mean_cost(x0, z)


def test_a_larger_batch_is_coupled_more_cheaply():
    found = []
    for count in (1, 8, 64, 256):
        x0, z, u = drawn(256, seed=7)
        parts = zip(x0.split(count), z.split(count), u.split(count), strict=True)
        found.append(mean_cost(x0, torch.cat([couple(a, b, "exact", c) for a, b, c in parts])))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


def test_the_entropic_plan_lies_between_the_exact_one_and_none():
    x0, z, _ = drawn(16)
    cost = squared_distances(x0, z)
    sharp, flat = sinkhorn_plan(cost, 2e-3), sinkhorn_plan(cost, 1e4)
    assert float(sharp[torch.arange(16), exact_coupling(cost)].sum()) > 0.9
    assert float((flat - 1 / 256).abs().max()) < 1e-6


def test_the_plan_stays_finite_where_its_kernel_underflows():
    cost = squared_distances(torch.randn(8, 2) * 100, torch.randn(8, 2))
    assert bool(sinkhorn_plan(cost, 1e-4).isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_coupled_each_among_itself(kind):
    x0, z, u = drawn(256)
    label = torch.arange(256) % 2
    x0 = 0.3 * x0 + torch.stack((3.0 * label - 1.5, 0.0 * label), 1)
    by_class, together = couple_by_class(x0, z, label, kind, u), couple(x0, z, kind, u)

    def gap(coupled):
        return float(coupled[label == 1, 0].mean() - coupled[label == 0, 0].mean())

    assert abs(gap(by_class)) < 0.35
    assert gap(together) > 0.7
    for each in (0, 1):
        allowed = set(z[label == each, 0].tolist())
        assert set(by_class[label == each, 0].tolist()) <= allowed
    assert mean_cost(x0, by_class) < mean_cost(x0, z)


def test_the_same_numbers_give_the_same_coupling():
    x0, z, u = drawn(64)
    assert torch.equal(couple(x0, z, "sinkhorn", u), couple(x0, z, "sinkhorn", u))
    assert not torch.equal(couple(x0, z, "sinkhorn", u), couple(x0, z, "sinkhorn", u.flip(0)))


def test_an_unknown_coupling_is_named():
    x0, z, u = drawn(4)
    with pytest.raises(ConfigurationError, match="coupling has no choice 'exakt'"):
        couple(x0, z, "exakt", u)
