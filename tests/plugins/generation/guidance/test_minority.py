# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateUsage=false
"""Minority guidance: scores, bins and neighbours against hand and exact values; rarer samples; the kept classifier."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.generation import GaussianMixture, Generated, sample
from lightrail.traits import traits_of
from lightrail_generation.guidance import noisy_classifier
from lightrail_generation.guidance.minority import Minority, bins_of, minority_scores, neighbour_distances
from lightrail_generation.guidance.noisy_classifier import NoisyClassifier, keep, kept_classifier, trained_on_bins
from lightrail_generation.samplers.ddim import DDIM
from lightrail_generation.samplers.dpm_solver_pp import DPMSolverPP
from lightrail_generation.samplers.edm import EDMHeun
from lightrail_generation.time_grids.uniform_lambda import UniformLambda

MIXTURE = GaussianMixture()


@pytest.fixture(scope="module", autouse=True)
def short_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noisy_classifier, "STEPS", 120)
        yield


@pytest.fixture(scope="module")
def fitted(short_training):
    guidance = Minority(bins=4, draws=4, rho=0.5)
    guidance.prepare(MIXTURE, DDIM(8))
    return guidance


def drawn(chain, sampler=None, indices=range(8)):
    sampler = sampler or DPMSolverPP(8)
    return sample(MIXTURE, sampler, sampler.grid(MIXTURE.path, UniformLambda()), indices, seed=3, guidance=chain)


def test_the_score_of_a_gaussian_is_what_its_denoiser_loses():
    # With x_t = α x + σ z, D(x_t) − x = −(1 − k α)(x − m) + k σ z for k = α v/(α² v + σ²).
    v, m = 0.3, torch.tensor([0.4, -0.7], dtype=torch.float64)
    gaussian = GaussianMixture(means=[m.tolist()], weights=[1.0], variances=[v])
    level = gaussian.path.level_at_lam(-math.log(0.5))
    k = level.alpha * v / (level.alpha**2 * v + level.sigma**2)
    x = torch.tensor([[0.4, -0.7], [1.4, -0.7], [2.0, 2.0]], dtype=torch.float64)
    wanted = (1 - k * level.alpha) ** 2 * (x - m).square().mean(1) + (k * level.sigma) ** 2
    found = minority_scores(gaussian, x, 0.5, 500)
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.003)
    assert bool((found.diff() > 0).all())


def test_the_score_of_a_sample_does_not_depend_on_the_others(monkeypatch):
    x = MIXTURE.examples(20)
    whole = minority_scores(MIXTURE, x, 0.3, 3)
    torch.testing.assert_close(minority_scores(MIXTURE, x[:5], 0.3, 3), whole[:5])
    monkeypatch.setattr("lightrail_generation.guidance.minority.ROWS", 7)
    torch.testing.assert_close(minority_scores(MIXTURE, x, 0.3, 3), whole)


def test_bins_are_equally_full_and_ordered():
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bins = bins_of(scores, 10)
    assert bins.bincount().tolist() == [100] * 10
    tops = [float(scores[bins == i].max()) for i in range(10)]
    assert all(a < b for a, b in itertools.pairwise(tops))


def test_neighbours_by_hand():
    data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    found = neighbour_distances(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), data, k=2)
    assert found.tolist() == pytest.approx([0.5, (1 + math.sqrt(13)) / 2])
    assert neighbour_distances(data[:1], data[:1]).tolist() == [0.0]


def test_it_leads_to_rarer_samples_and_the_lowest_bin_to_commoner_ones(fitted):
    found = {}
    for name, target, scale in (("none", 3, 0.0), ("rare", 3, 2.0), ("common", 0, 2.0)):
        fitted.target, fitted.scale = target, scale
        x = drawn([fitted], indices=range(200)).x
        found[name] = {
            **fitted.measure(Generated(x, x)),
            "log_density": float(MIXTURE.log_density(x, 0.0).mean()),
        }
    fitted.target, fitted.scale = 3, 3.5
    for metric, sign in (("neighbour_distance", 1), ("minority_score", 1), ("log_density", -1)):
        common, plain, rare = (sign * found[name][metric] for name in ("common", "none", "rare"))
        assert common < plain < rare, metric


@pytest.mark.parametrize("sampler", [DPMSolverPP(8), EDMHeun(8)])
def test_it_costs_no_evaluation_and_a_sample_does_not_depend_on_its_batch(fitted, sampler):
    together, plain = drawn([fitted], sampler), drawn([], sampler)
    assert together.evaluations == plain.evaluations
    assert not torch.allclose(together.x, plain.x)
    alone = drawn([fitted], sampler, [5])
    torch.testing.assert_close(alone.x[0], together.x[5], rtol=1e-4, atol=1e-4)  # the classifier is of single precision


def test_a_scale_of_nothing_leaves_the_samples_alone(fitted):
    fitted.scale = 0.0
    try:
        assert torch.equal(drawn([fitted]).x, drawn([]).x)
    finally:
        fitted.scale = 3.5


def test_the_classifier_learns_from_noisy_states_and_leaves_the_callers_random_numbers_alone():
    states = torch.cat((torch.randn(200, 2) - 4, torch.randn(200, 2) + 4))
    labels = torch.arange(400) // 200
    before = torch.get_rng_state()
    with torch.inference_mode():
        classifier = trained_on_bins(states, labels, 2, MIXTURE.path)
        again = trained_on_bins(states, labels, 2, MIXTURE.path)
    assert torch.equal(before, torch.get_rng_state())
    x = torch.randn(50, 2)
    for t in (0.02, 0.3):
        level = MIXTURE.path.level(t)
        noised = level.alpha * states[::8] + level.sigma * x
        found = classifier(noised, level)
        assert float((found.argmax(1) == labels[::8]).double().mean()) > 0.95
        torch.testing.assert_close(again(noised, level), found)
    each = MIXTURE.path.levels(torch.full((50,), 0.3), 2)
    torch.testing.assert_close(classifier(noised, each), found)


def test_it_is_kept_in_the_run_folder_and_found_again(tmp_path, monkeypatch):
    trained = []

    def training(*arguments):
        trained.append(arguments)
        return NoisyClassifier((2,), 3).eval().requires_grad_(False)

    monkeypatch.setattr("lightrail_generation.guidance.minority.trained_on_bins", training)
    mixture = GaussianMixture()
    mixture.folder = tmp_path
    for expected, options in ((1, {}), (1, {}), (2, {"rho": 0.4}), (3, {"draws": 3})):
        Minority(bins=3, **options).prepare(mixture, DDIM(4))
        assert len(trained) == expected
    assert (tmp_path / "minority.safetensors").is_file()
    other = GaussianMixture(variances=[0.1, 0.1, 0.1])
    other.folder = tmp_path
    Minority(bins=3, draws=3).prepare(other, DDIM(4))
    assert len(trained) == 4
    (tmp_path / "minority.safetensors").write_bytes(b"nothing")
    Minority(bins=3, draws=3).prepare(other, DDIM(4))
    assert len(trained) == 5


def test_a_kept_classifier_answers_as_before(tmp_path):
    classifier, path = NoisyClassifier((2,), 3).eval(), tmp_path / "minority.safetensors"
    classifier.mean.fill_(2.0)
    keep(classifier, path, "this")
    assert kept_classifier(path, "that", (2,), 3) is None
    assert kept_classifier(tmp_path / "none", "this", (2,), 3) is None
    found, x, level = kept_classifier(path, "this", (2,), 3), torch.randn(4, 2), MIXTURE.path.level(0.4)
    assert found is not None
    torch.testing.assert_close(found(x, level), classifier(x, level))
    keep(classifier, tmp_path / "nowhere" / "below" / "minority.safetensors", "this")


def test_what_cannot_work_is_refused():
    for options, named in (
        ({"scale": -1.0}, "scale"),
        ({"bins": 1}, "bins"),
        ({"draws": 0}, "draws"),
        ({"rho": 0.0}, "rho"),
        ({"target": 10}, "no such bin"),
        ({"target": -1}, "no such bin"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            Minority(**options)
    mixture = GaussianMixture()
    mixture.examples = lambda count: torch.zeros(3, 2).double()
    with pytest.raises(CompositionError, match="fewer data than bins"):
        Minority(bins=4).prepare(mixture, DDIM(4))
    mixture.gives = ("flow",)
    with pytest.raises(CompositionError, match="does not have"):
        Minority().prepare(mixture, DDIM(4))
    assert Minority().measure(Generated(torch.zeros(2, 2), torch.zeros(2, 2))) == {}


def test_it_is_made_ready_when_it_was_not_and_by_the_example_of_its_card():
    card = traits_of(Minority)
    guidance = Minority(**card.example)
    assert bool(drawn([guidance], DDIM(4)).x.isfinite().all())
    assert card.sampling_claims[0].metric in guidance.measure(Generated(MIXTURE.examples(4), torch.zeros(4, 2)))
