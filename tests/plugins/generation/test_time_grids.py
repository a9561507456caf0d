"""Time grids: spacing by hand, and the same on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightrail.errors import ConfigurationError
from lightrail.generation import KarrasVE, LinearFlow, LinearVP, NoisePath, TableVP, TimeGrid
from lightrail_generation.time_grids.explicit import Explicit
from lightrail_generation.time_grids.karras import Karras
from lightrail_generation.time_grids.quadratic import Quadratic
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

PATHS: list[NoisePath] = [
    LinearVP(),
    KarrasVE(),
    LinearFlow(),
    TableVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)),
]


def times(grid: TimeGrid, path: NoisePath, steps: int, **options: bool) -> list[float]:
    return [level.t for level in grid.grid(path, steps, **options)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_each_spacing_is_uniform_in_its_own_variable(path: NoisePath) -> None:
    options = {"start": path.t_finite, "stop": path.t_min + 0.01 * path.t_max, "end": "minimum"}
    by_lambda = [level.lam for level in UniformLambda(**options).grid(path, 9)]
    np.testing.assert_allclose(np.diff(by_lambda, 2), 0, atol=1e-6)
    by_root = [level.rho ** (1 / 5) for level in Karras(rho=5, **options).grid(path, 9)]
    np.testing.assert_allclose(np.diff(by_root, 2), 0, atol=1e-6 * by_root[0])
    by_time = times(Uniform(**options), path, 9)
    np.testing.assert_allclose(np.diff(by_time, 2), 0, atol=1e-9 * path.t_max)
    by_square_root = np.sqrt(np.array(times(Quadratic(**options), path, 9)) - path.t_zero)
    np.testing.assert_allclose(np.diff(by_square_root, 2), 0, atol=1e-9 * by_square_root[0])


def test_karras_is_the_papers_list() -> None:
    # σ_i = (σ_max^{1/7} + i/(N−1) (σ_min^{1/7} − σ_max^{1/7}))^7 for N = 18, then 0.
    i = np.arange(18)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    found = times(Karras(), KarrasVE(), 18)
    np.testing.assert_allclose(found[:-1], wanted, rtol=1e-9)
    assert found[-1] == 0


def test_whole_training_times_stay_whole() -> None:
    table = PATHS[-1]
    found = times(Uniform(start=999, stop=-1.0, end="minimum"), table, 10)
    assert found == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]


def test_a_shift_spends_steps_at_the_noisy_end() -> None:
    found = times(Uniform(shift=3.0), LinearFlow(), 4, finite=False)
    np.testing.assert_allclose(found, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-12)
    assert times(Uniform(shift=1.0), LinearFlow(), 4, finite=False) == [1.0, 0.75, 0.5, 0.25, 0.0]
    part = times(Uniform(shift=3.0, start=0.9, stop=0.5, end="minimum"), LinearFlow(), 2)
    np.testing.assert_allclose(part, [0.9, 0.75, 0.5], rtol=1e-12)


def test_listed_times_are_taken_as_they_are() -> None:
    assert times(Explicit([0.9, 0.3, 0.0]), LinearFlow(), 2) == [0.9, 0.3, 0.0]
    assert times(Explicit([1.0, 0.0]), LinearFlow(), 1) == [1.0, 0.0]
    with pytest.raises(ConfigurationError, match="do not make that many steps"):
        times(Explicit([0.9, 0.3, 0.0]), LinearFlow(), 3)
    with pytest.raises(ConfigurationError, match="does not fall"):
        times(Explicit([0.9, 0.9, 0.0]), LinearFlow(), 2)
    with pytest.raises(ConfigurationError, match="leaves the noise path"):
        times(Explicit([1.9, 0.9]), LinearFlow(), 1)
    with pytest.raises(ConfigurationError, match="start and an end"):
        Explicit([0.5])


@pytest.mark.parametrize(("make", "name"), [(lambda: Karras(rho=0), "rho"), (lambda: Quadratic(power=-1), "power")])
def test_options_out_of_range_are_named(make, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=f"{name} is out of range"):
        make()
