"""Distances between sets of points, against closed forms and other ways to work them out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from lightrail.errors import DataError
from lightrail_generation.quality import distances
from lightrail_generation.quality.distances import frechet_distance, kernel_distance, sliced_wasserstein


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(mean: torch.Tensor, root: torch.Tensor, rows: int = 50, seed: int = 0) -> torch.Tensor:
    """Points whose mean and covariance (over N − 1) are exactly ``mean`` and root rootᵀ."""
    x = drawn(rows, len(mean), seed)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / (rows - 1))
    return x @ (vectors / values.sqrt()) @ vectors.T @ root.T + mean


# Fréchet.


def test_frechet_distance_of_gaussians_is_the_closed_form():
    first, second = drawn(4, 4, 1), drawn(4, 4, 2)
    m, n = drawn(1, 4, 3)[0], drawn(1, 4, 4)[0]
    a, b = first @ first.T, second @ second.T
    root = torch.from_numpy(np.real(scipy.linalg.sqrtm((a @ b).numpy())))
    expected = float((m - n).square().sum() + a.trace() + b.trace() - 2 * root.trace())
    found = frechet_distance(with_moments(m, first), with_moments(n, second, rows=80, seed=5))
    assert math.isclose(found, expected, rel_tol=1e-9)


def test_frechet_distance_in_one_dimension_is_that_of_mean_and_deviation():
    one = torch.ones(1, dtype=torch.float64)
    x, y = with_moments(one, 2 * one[None]), with_moments(4 * one, 5 * one[None], seed=1)
    assert math.isclose(frechet_distance(x, y), 3**2 + 3**2, rel_tol=1e-10)


def test_frechet_distance_sees_what_coordinates_alone_do_not():
    """Two correlations of opposite sign: every mean and variance is equal."""
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    flipped = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)) @ root
    # Σ √ of the eigenvalues of C_x C_y, with C = [[1, ±.8], [±.8, 1]]: both are 1 − .64.
    assert math.isclose(frechet_distance(with_moments(zero, root), with_moments(zero, flipped)), 4 - 4 * 0.6)


def test_frechet_distance_of_a_set_from_itself_is_zero_even_where_it_is_flat():
    x = drawn(10, 30)  # fewer points than dimensions
    assert frechet_distance(x, x) < 1e-6
    assert frechet_distance(x, x + 1) == pytest.approx(30, abs=1e-6)


# The kernel.


def by_loops(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_sum_over_pairs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distances, "ROWS", 4)  # so that several blocks are summed
    x, y = drawn(9, 3), drawn(7, 3, 1) + 0.5
    assert math.isclose(kernel_distance(x, y), by_loops(x, y), rel_tol=1e-12)
    assert math.isclose(kernel_distance(y, x), by_loops(x, y), rel_tol=1e-12)


def test_kernel_distance_has_no_bias_and_is_negative_at_times():
    found = [kernel_distance(drawn(20, 2, 2 * seed), drawn(20, 2, 2 * seed + 1)) for seed in range(400)]
    error = np.std(found) / math.sqrt(len(found))
    assert min(found) < 0
    assert abs(np.mean(found)) < 3.5 * error
    # With each point beside itself, as the biased estimate has it, the mean would lie far above.
    biased = np.mean([np.mean((1 + drawn(20, 2, seed).square().sum(1).numpy() / 2) ** 3) for seed in range(400)])
    assert 2 * biased / 20 > 10 * error


def test_kernel_distance_has_the_expectation_of_the_population():
    """For N(0, 1) and N(1, 1): E k(x, x') = 1 + 3·E(xx')² and the like, by moments of normal variables."""

    def moments(mean: float) -> tuple[float, float, float]:
        return mean, mean**2 + 1, mean**3 + 3 * mean

    def expected(a: float, b: float) -> float:
        return 1 + sum(c * p * q for c, p, q in zip((3, 3, 1), moments(a), moments(b), strict=True))

    truth = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    found = [kernel_distance(drawn(50, 1, 2 * seed), drawn(50, 1, 2 * seed + 1) + 1) for seed in range(400)]
    assert truth == 22
    assert abs(np.mean(found) - truth) < 3.5 * np.std(found) / math.sqrt(len(found)) < 5


# Wasserstein.


def test_wasserstein_of_a_shift_is_the_shift():
    x = drawn(40, 1)
    assert math.isclose(sliced_wasserstein(x, x + 3), 3, rel_tol=1e-12)
    assert sliced_wasserstein(x, x.flip(0)) == 0


def test_sets_of_unequal_size_are_compared_exactly():
    """Against the definition as a linear programme over all ways to move the mass."""
    x, y = drawn(5, 1), drawn(7, 1, 1)
    costs = (x - y.T).square().numpy()
    rows = [np.kron(row, np.ones(7)) for row in np.eye(5)] + [np.kron(np.ones(5), column) for column in np.eye(7)]
    masses = [*[1 / 5] * 5, *[1 / 7] * 7]
    solved = scipy.optimize.linprog(costs.flatten(), A_eq=np.array(rows), b_eq=masses)
    assert math.isclose(sliced_wasserstein(x, y) ** 2, solved.fun, rel_tol=1e-8)
    # Each point as often again is the same set.
    assert math.isclose(sliced_wasserstein(x.repeat(7, 1), y.repeat(5, 1)), sliced_wasserstein(x, y), rel_tol=1e-12)


def test_wasserstein_over_directions_is_that_of_projections():
    x, y = drawn(30, 4), 2 * drawn(30, 4, 1) + 1
    directions = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    directions = directions / directions.norm(dim=0)
    squares = ((x @ directions).sort(0).values - (y @ directions).sort(0).values).square().mean(0)
    assert math.isclose(sliced_wasserstein(x, y, 64, seed=3), float(squares.mean().sqrt()), rel_tol=1e-12)


def test_wasserstein_of_a_shift_in_the_plane_shrinks_with_the_dimension():
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    x = drawn(20, 2)
    # The mean of (θᵀδ)² over all directions is ‖δ‖²/2.
    assert abs(sliced_wasserstein(x, x + shift, 20_000) - 5 / math.sqrt(2)) < 0.03
    assert math.isclose(sliced_wasserstein(x.view(10, 2, 2), (x + shift).view(10, 2, 2)),
                        sliced_wasserstein(x.view(10, 4), (x + shift).view(10, 4)))  # fmt: skip


def test_wasserstein_uses_no_random_numbers_of_the_caller():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert sliced_wasserstein(drawn(9, 3), drawn(9, 3, 1)) == sliced_wasserstein(drawn(9, 3), drawn(9, 3, 1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, sliced_wasserstein])
def test_sets_that_cannot_be_compared_are_refused(distance):
    for x, y in ((drawn(1, 2), drawn(5, 2)), (drawn(5, 2), drawn(5, 3))):
        with pytest.raises(DataError):
            distance(x, y)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, sliced_wasserstein])
def test_distances_are_symmetric_and_worked_out_in_double_precision(distance):
    x, y = drawn(30, 3) + 100, drawn(25, 3, 1) * 1.5 + 100
    there, back = distance(x, y), distance(y, x)
    assert math.isclose(there, back, rel_tol=1e-7)
    assert math.isclose(distance(x.float(), y.float()), there, rel_tol=1e-4)
