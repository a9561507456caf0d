# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Regional eta: DDIM's fresh noise inside a mask, nothing outside, and with which samplers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightrail.catalogue import available, load
from lightrail.errors import CompositionError, ConfigurationError, DataError, UserError
from lightrail.generation import (
    Denoiser,
    Evaluator,
    GaussianMixture,
    Guidance,
    LinearVP,
    Moment,
    Noise,
    Sampler,
    sample,
)
from lightrail.traits import traits_of
from lightrail_generation.guidance.regional_eta import RegionalEta, box_mask, turned
from lightrail_generation.guidance.time_travel import TimeTravel
from lightrail_generation.samplers.bdia import BDIA
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.ddpm import DDPM
from lightrail_generation.samplers.deis import DEIS
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.samplers.pndm import FPNDM
from lightrail_generation.samplers.unipc import UniPC
from lightrail_generation.time_grids.uniform import Uniform
from lightrail_generation.wrappers.time_shift import TimeShift

MIXTURE = GaussianMixture()


class Images(Denoiser):
    """Independent pixels N(0, ¼), whose exact denoiser is linear: D = α x/4 / (α²/4 + σ²)."""

    form = "data"
    dtype = torch.float64
    path = LinearVP()

    def __init__(self, height=4, width=6):
        self.shape = (2, height, width)

    def output(self, x, t, condition):
        level = self.path.levels(t, x.ndim)
        return x * (level.alpha / 4 / (level.alpha**2 / 4 + level.sigma**2)).to(x.dtype)


class OfGuidance(Noise):
    """The sampler is given the numbers that the guidance draws."""

    def normal(self, step, draw=0):
        return super().normal(step, 1000 if step >= 0 else draw)


def drawn(guidance, sampler, model=MIXTURE, indices=range(4), end="zero", **options):
    for each in guidance:
        each.prepare(model, sampler)
    grid = sampler.grid(model.path, Uniform(end=end))
    return sample(model, sampler, grid, indices, seed=3, guidance=guidance, **options)


def ancestral(eta, model, indices=range(4), steps=6):
    """DDIM with η, which draws the guidance's numbers."""
    sampler = DDIM(steps, eta=eta)
    grid = sampler.grid(model.path, Uniform())
    start = model.start(Noise(3, indices, model.shape, torch.float64), grid[0])
    noise = OfGuidance(3, indices, model.shape, torch.float64)
    return sampler.solve(sampler.start(start, noise, grid), Evaluator(model), grid).x


@pytest.mark.parametrize("path", ["linear", "edm", "flow"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_everywhere_it_is_ddim_with_eta(path, eta):
    model = GaussianMixture(path=path)
    torch.testing.assert_close(
        drawn([RegionalEta(eta=eta)], DDIM(6), model).x, ancestral(eta, model), rtol=1e-10, atol=1e-10
    )


def test_inside_a_box_it_is_ddim_with_eta_and_outside_without():
    model = Images()
    found = drawn([RegionalEta(eta=0.7, mask=[0.0, 0.5, 0.5, 1.0])], DDIM(6), model).x
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[:2, 3:] = True
    torch.testing.assert_close(found[..., inside], ancestral(0.7, model)[..., inside], rtol=1e-10, atol=1e-10)
    assert torch.equal(found[..., ~inside], drawn([], DDIM(6), model).x[..., ~inside])
    assert (found - drawn([], DDIM(6), model).x)[..., inside].abs().min() > 1e-6


def test_by_hand():
    e, z = torch.tensor([2.0]).double(), torch.tensor([3.0]).double()
    # σ = 0.5 and s = 0.3: √(0.25 − 0.09) = 0.4
    found = 0.5 * turned(e, z, torch.tensor(0.6).double())
    torch.testing.assert_close(found, (0.4 - 0.5) * e + 0.3 * z)


def test_a_box_takes_the_pixels_whose_centres_it_holds():
    wanted = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).double()
    assert torch.equal(box_mask([0.25, 0.25, 0.75, 0.75], 4, 4), wanted)
    assert torch.equal(box_mask([0.13, 0.13, 0.87, 0.87], 4, 4), wanted)
    assert box_mask([0, 0, 1, 1], 3, 5).all()


def test_a_mask_can_be_a_file(tmp_path):
    model = Images()
    box = box_mask([0, 0, 0.5, 0.5], 4, 6)
    wanted = drawn([RegionalEta(eta=0.7, mask=[0, 0, 0.5, 0.5])], DDIM(4), model).x
    np.save(tmp_path / "mask.npy", box.numpy())
    np.save(tmp_path / "whole.npy", box.expand(2, 4, 6).numpy())
    np.save(tmp_path / "large.npy", box.repeat_interleave(3, 0).repeat_interleave(2, 1).numpy())
    for name in ("mask", "whole", "large"):
        assert torch.equal(drawn([RegionalEta(0.7, str(tmp_path / f"{name}.npy"))], DDIM(4), model).x, wanted)
    image = pytest.importorskip("PIL.Image")
    image.fromarray((box.numpy() * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    assert torch.equal(drawn([RegionalEta(0.7, str(tmp_path / "mask.png"))], DDIM(4), model).x, wanted)


def test_shares_in_a_file_are_shares_of_eta(tmp_path):
    np.save(tmp_path / "half.npy", np.full((4, 6), 0.5))
    found = drawn([RegionalEta(1.0, str(tmp_path / "half.npy"))], DDIM(6), Images()).x
    torch.testing.assert_close(found, ancestral(0.5, Images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "sampler", [DDIM(6), DPMSolverPP(6), UniPC(6), EDMHeun(6)], ids=lambda each: type(each).__name__
)
def test_without_eta_it_is_the_run_alone_and_it_never_asks_the_network(sampler):
    plain = drawn([], sampler)
    assert torch.equal(drawn([RegionalEta(eta=0.0)], sampler).x, plain.x)
    found = drawn([RegionalEta(eta=0.5)], sampler)
    assert found.evaluations == plain.evaluations
    assert (found.x - plain.x).abs().max() > 1e-3


@pytest.mark.parametrize(
    "sampler", [DPMSolverPP(240), UniPC(240), DEIS(240), FPNDM(240), EDMHeun(240)], ids=lambda each: type(each).__name__
)
def test_the_distribution_stays_with_samplers_of_higher_order(sampler):
    # The flow keeps the variance of the pixels, and so does the stochastic process, to first order in the step.
    plain, found = (drawn(each, sampler, Images(10, 15), range(12)).x.var().item() for each in ([], [RegionalEta(1.0)]))
    assert plain == pytest.approx(0.25, rel=0.05)
    assert found == pytest.approx(plain, rel=0.1)


def test_kept_predictions_see_the_new_noise_behind_the_same_data():
    kept = []

    class Sees(Guidance):
        def after_step(self, state, moment):
            kept.append(state)
            return state

    sampler, eta = DPMSolverPP(4, order=2), 0.8
    drawn([Sees(), RegionalEta(eta=eta), Sees()], sampler)
    before, after = kept[2], kept[3]
    grid = sampler.grid(MIXTURE.path, Uniform())
    share = eta * math.sqrt(-math.expm1(-2 * (grid[2].lam - grid[1].lam)))
    z = Noise(3, range(4), (2,), torch.float64).normal(1, 2000)
    (old,), (new,) = before.history, after.history
    torch.testing.assert_close(new.data, old.data)
    torch.testing.assert_close(new.noise, math.sqrt(1 - share**2) * old.noise + share * z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.x - before.x, grid[2].sigma * (new.noise - old.noise), rtol=1e-9, atol=1e-9)


def test_a_step_that_is_taken_again_gets_other_noise(monkeypatch):
    asked, original = [], Moment.normal

    def seen(moment, draw=0):
        asked.append((moment.index, moment.first_draw + draw))
        return original(moment, draw)

    monkeypatch.setattr(Moment, "normal", seen)
    chain = [RegionalEta(eta=1.0), TimeTravel(repeats=2, start=0.5, stop=0.75)]
    assert drawn(chain, DDIM(4)).evaluations == 6
    assert [index for index, _ in asked] == [0, 1, 2, 2, 2, 2, 2]  # nothing is drawn for the last step
    assert len(set(asked)) == 7
    # Those of the step that will be taken again are left alone by what comes behind.
    assert drawn(chain[::-1], DDIM(4)).evaluations == 6


def test_a_sample_does_not_depend_on_its_batch():
    guidance = [RegionalEta(eta=0.9)]
    together = drawn(guidance, UniPC(8))
    alone = drawn(guidance, UniPC(8), indices=[2])
    torch.testing.assert_close(alone.x[0], together.x[2], rtol=1e-12, atol=1e-12)


def test_it_works_with_every_sampler_or_refuses_it_by_name():
    refused, said = set(), []
    for name in available("sampler"):
        try:
            plugin = load("sampler", name)
        except UserError:
            continue
        if not (isinstance(plugin, type) and issubclass(plugin, Sampler)):
            continue
        sampler = plugin(**{**dict(traits_of(plugin).example), "steps": 6})
        try:
            found = drawn([RegionalEta(eta=0.5)], sampler, end="minimum")
        except CompositionError as error:
            refused.add(name)
            said.append((plugin.__name__, error.what))
            continue
        assert found.x.isfinite().all(), name
        assert found.evaluations == drawn([], sampler, end="minimum").evaluations, name
    carriers = {"bdia", "dpm_solver_v3", "heavy_ball", "nesterov", "ghvb"}
    assert refused == {"ddpm", "dmcmc", "si_sde", *carriers}
    assert all(name in what for name, what in said)


@pytest.mark.parametrize(
    "sampler", [DDPM(4), DDIM(4, eta=0.5), DPMSolverPP(4, stochastic=True), TimeShift(BDIA(4))], ids=range(4)
)
def test_samplers_with_noise_of_their_own_are_refused(sampler):
    with pytest.raises(CompositionError) as caught:
        RegionalEta().prepare(MIXTURE, sampler)
    assert "RegionalEta" in caught.value.what
    assert caught.value.remedy


def test_a_box_is_refused_where_a_state_is_no_image():
    with pytest.raises(CompositionError, match="region of an image"):
        RegionalEta(mask=[0, 0, 1, 1]).prepare(MIXTURE, DDIM(4))


@pytest.mark.parametrize(
    "options",
    [
        {"eta": -0.1},
        {"eta": 1.1},
        {"mask": [0, 0, 1]},
        {"mask": [0.5, 0, 0.5, 1]},
        {"mask": [0, 0.9, 1, 0.1]},
        {"mask": [0, 0, 1, 28]},
        {"mask": [0, 0, "half", 1]},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError) as caught:
        RegionalEta(**options)
    assert next(iter(options)) in caught.value.found


def test_a_file_that_is_no_mask_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    np.save(tmp_path / "large.npy", np.full((4, 6), 2.0))
    np.save(tmp_path / "channels.npy", np.ones((3, 4, 6)))
    for name in ("text.png", "large.npy", "channels.npy", "nowhere.npy"):
        with pytest.raises(DataError) as caught:
            RegionalEta(mask=str(tmp_path / name)).prepare(Images(), DDIM(4))
        assert name in caught.value.found
