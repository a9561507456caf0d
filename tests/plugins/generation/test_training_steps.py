# pyright: reportArgumentType=false
"""Training steps: diffusers' spacings to the last time, each followed by the next, and none twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, LinearFlow, LinearVP, TableVP, sample
from lightrail_generation.samplers.ddim import DDIM, transfer
from lightrail_generation.time_grids.training_steps import TrainingSteps, spaced

MIXTURE = GaussianMixture(path="ddpm")
PATH = MIXTURE.path
SHORT = TableVP(torch.linspace(0.99, 0.01, 20, dtype=torch.float64))
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LATENT_PATH = TableVP(torch.cumprod(1 - LATENT_BETAS, 0))


def times_of(grid):
    return [level.t for level in grid]


def rhos_of(grid):
    return np.array([level.rho for level in grid])


@pytest.fixture(scope="module")
def schedulers():
    return pytest.importorskip("diffusers").schedulers


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_times_are_those_of_diffusers_one_step_methods(schedulers, spacing):
    theirs = schedulers.DDIMScheduler(timestep_spacing=spacing)
    for steps in range(2, 1001):
        theirs.set_timesteps(steps)
        assert spaced(spacing, 1000, steps).tolist() == theirs.timesteps.tolist()[:steps], steps
    theirs.set_timesteps(20)
    assert times_of(TrainingSteps(spacing=spacing).grid(PATH, 20)) == [*theirs.timesteps.tolist(), -1.0]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_times_and_levels_are_those_of_diffusers_multistep_methods(schedulers, name, spacing):
    offset = int(spacing == "leading")
    theirs = getattr(schedulers, name)(**LATENT, timestep_spacing=spacing, steps_offset=offset)
    for steps in [2, 3, 5, 10, 27, 48, 50]:
        theirs.set_timesteps(steps)
        ours = TrainingSteps(spacing=spacing, steps_offset=offset, drops_last=spacing != "trailing")
        grid = ours.grid(LATENT_PATH, steps)
        assert times_of(grid)[:-1] == theirs.timesteps.tolist(), steps
        np.testing.assert_allclose(rhos_of(grid), theirs.sigmas.numpy(), rtol=2e-5)


@pytest.mark.parametrize(("spacing", "option"), [("karras", "use_karras_sigmas"), ("lambda", "use_lu_lambdas")])
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_noise_spacings_are_those_of_diffusers(schedulers, spacing, option, steps):
    theirs = schedulers.DPMSolverMultistepScheduler(**LATENT, **{option: True})
    theirs.set_timesteps(steps)
    grid = TrainingSteps(spacing=spacing).grid(LATENT_PATH, steps)
    np.testing.assert_allclose(rhos_of(grid), theirs.sigmas.numpy(), rtol=2e-5)
    assert times_of(grid)[:-1] == theirs.timesteps.tolist()
    assert all(level.t == round(level.t) for level in grid)


def test_the_network_is_told_a_whole_time_while_the_level_stays_exact():
    level = TrainingSteps(spacing="lambda").grid(LATENT_PATH, 5)[2]
    high, low = LATENT_PATH.level(999).lam, LATENT_PATH.level(0).lam
    assert level.lam == pytest.approx((high + low) / 2, abs=1e-10)
    assert level.t == round(level.t)
    assert abs(LATENT_PATH.level(level.t).lam - level.lam) > 1e-5


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_a_run_that_stops_at_the_first_training_time_is_that_of_diffusers(schedulers, steps):
    theirs = schedulers.DEISMultistepScheduler(**LATENT)
    theirs.set_timesteps(steps)
    grid = TrainingSteps(spacing="linspace", drops_last=True, end="minimum").grid(LATENT_PATH, steps)
    np.testing.assert_allclose(rhos_of(grid), theirs.sigmas.numpy(), rtol=2e-5)
    assert grid[-1].t == 0.0
    assert not grid[-1].is_clean


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "lambda"])
@pytest.mark.parametrize("end", ["zero", "minimum", "denoise"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_every_end_makes_the_steps_that_were_asked_for(spacing, end, steps):
    grid = TrainingSteps(spacing=spacing, end=end).grid(PATH, steps)
    assert grid.steps == steps
    assert times_of(grid)[-1] == (-1.0 if end == "zero" else 0.0)
    assert grid.denoises_last == (end == "denoise")
    assert times_of(grid)[:-1] == sorted(set(times_of(grid)[:-1]), reverse=True)


def test_a_spacing_that_reaches_the_end_is_spaced_once_more():
    assert times_of(TrainingSteps(spacing="linspace", end="minimum").grid(PATH, 3)) == [999, 666, 333, 0]
    assert times_of(TrainingSteps(spacing="linspace").grid(PATH, 4)) == [999, 666, 333, 0, -1]
    offset = TrainingSteps(spacing="leading", steps_offset=1, end="minimum")
    assert times_of(offset.grid(PATH, 4)) == [751, 501, 251, 1, 0]


def test_halves_are_rounded_to_even():
    assert spaced("linspace", 1000, 5).tolist() == [999, 749, 500, 250, 0]
    assert spaced("trailing", 1000, 16)[[1, 3]].tolist() == [937, 811]  # 937.5 and 812.5


def test_one_step_starts_at_the_noise():
    assert times_of(TrainingSteps().grid(PATH, 1)) == [999, -1]
    assert times_of(TrainingSteps(spacing="linspace").grid(PATH, 1)) == [999, -1]


def test_it_starts_where_it_is_told():
    grid = TrainingSteps(start=499).grid(PATH, 5)
    assert times_of(grid) == [499, 399, 299, 199, 99, -1]
    assert TrainingSteps(spacing="karras", start=499).grid(PATH, 5)[0].rho == PATH.level(499).rho


def test_solvers_that_divide_by_the_signal_start_where_there_is_some():
    angle = ((torch.linspace(0, 1, 1001, dtype=torch.float64) + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    cosine = TableVP(torch.cumprod(angle[1:] / angle[:-1], 0).clamp(min=2.4e-9))
    assert cosine.level(999).alpha < 2**-12 < cosine.level(998).alpha
    assert times_of(TrainingSteps().grid(cosine, 4)) == [998, 749, 499, 249, -1]
    assert times_of(TrainingSteps().grid(cosine, 4, finite=False)) == [999, 749, 499, 249, -1]
    assert times_of(TrainingSteps("leading").grid(cosine, 4)) == [750, 500, 250, 0, -1]


def noise_of_mixture(x, t):
    return MIXTURE.predict(x, PATH.level(float(t))).noise


def their_ddim(schedulers, x, steps, spacing):
    scheduler = schedulers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(noise_of_mixture(x, t), t, x).prev_sample
    return x


def ddim_by_stride(x, times, stride):
    """The fault: each step leads ⌊T/N⌋ down, wherever the next time is."""
    for t in times:
        there = PATH.level(max(-1.0, t - stride))
        x = transfer(MIXTURE.predict(x, PATH.level(float(t))), there)
    return x


def test_steps_lead_to_the_next_time_where_diffusers_ddim_goes_elsewhere(schedulers):
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))

    def ours(spacing):
        grid = TrainingSteps(spacing=spacing).grid(PATH, 10)
        return sample(MIXTURE, DDIM(10), grid, range(64), start=start).x

    # With `leading` both step to the next time.
    torch.testing.assert_close(ours("leading"), their_ddim(schedulers, start, 10, "leading"), atol=1e-5, rtol=0)
    # With `linspace` the times lie 111 apart, and diffusers steps by 100.
    theirs = their_ddim(schedulers, start, 10, "linspace")
    torch.testing.assert_close(ddim_by_stride(start, spaced("linspace", 1000, 10), 100), theirs, atol=1e-5, rtol=0)
    assert float((ours("linspace") - theirs).abs().max()) > 0.05


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_on_them_converges_to_the_exact_solution(spacing):
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 2)))
    exact = MIXTURE.exact(start, 999.0, [-1.0])[0]
    errors = []
    for steps in (50, 100, 200):
        grid = TrainingSteps(spacing=spacing).grid(PATH, steps)
        errors.append(float((sample(MIXTURE, DDIM(steps), grid, range(16), start=start).x - exact).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_trailing_makes_the_steps_that_were_asked_for_where_rounding_gives_diffusers_one_more(schedulers):
    theirs = schedulers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert theirs.timesteps.tolist()[-1] == -1
    assert times_of(TrainingSteps().grid(PATH, 61)) == theirs.timesteps.tolist()


def test_more_steps_than_training_times_are_refused():
    with pytest.raises(ConfigurationError, match="that many steps") as error:
        TrainingSteps().grid(SHORT, 21)
    assert "1 to 20" in error.value.allowed
    with pytest.raises(ConfigurationError, match="that many steps"):
        TrainingSteps(end="minimum").grid(SHORT, 20)
    with pytest.raises(ConfigurationError, match="that many steps"):
        TrainingSteps(spacing="linspace", drops_last=True).grid(SHORT, 20)
    assert times_of(TrainingSteps().grid(SHORT, 20)) == list(range(19, -2, -1))


def test_one_step_of_leading_would_begin_at_the_data_and_is_refused():
    with pytest.raises(ConfigurationError, match="that many steps"):
        TrainingSteps(spacing="leading").grid(PATH, 1)
    assert times_of(TrainingSteps(spacing="leading", drops_last=True).grid(PATH, 1)) == [500, -1]


def test_levels_that_share_a_training_time_are_refused():
    with pytest.raises(ConfigurationError, match="share a training time") as error:
        TrainingSteps(spacing="karras").grid(LATENT_PATH, 60)
    assert "karras" in error.value.remedy


def test_an_offset_beyond_the_training_times_is_refused():
    with pytest.raises(ConfigurationError, match="leaves the noise path"):
        TrainingSteps(spacing="leading", steps_offset=1).grid(SHORT, 20)


@pytest.mark.parametrize("start", [1000, 1500])
def test_a_start_beyond_the_training_times_is_refused(start):
    with pytest.raises(ConfigurationError, match="leaves the noise path"):
        TrainingSteps(start=start).grid(PATH, 5)


@pytest.mark.parametrize("path", [LinearFlow(), LinearVP()])
def test_a_path_without_training_times_is_refused(path):
    with pytest.raises(CompositionError, match="no training steps") as error:
        TrainingSteps().grid(path, 5)
    assert "uniform" in error.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"spacing": "cosine"},
        {"steps_offset": -1},
        {"steps_offset": 1},
        {"drops_last": True},
        {"spacing": "karras", "drops_last": True},
        {"spacing": "linspace", "steps_offset": 1},
        {"start": 0},
        {"end": "nowhere"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        TrainingSteps(**options)
