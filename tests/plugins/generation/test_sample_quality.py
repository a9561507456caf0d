"""How good samples are: what is measured, what is kept, and a probe that shows it while a model trains."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.testing.quiet_trainer import quiet_trainer
from lightrail_generation.callbacks.sample_quality import SampleQualityProbe
from lightrail_generation.data.two_moons import TwoMoons
from lightrail_generation.models.point_mlp import PointMLP
from lightrail_generation.quality import classifier, sample_quality
from lightrail_generation.quality.classifier import trained_classifier
from lightrail_generation.quality.sample_quality import SampleQuality
from lightrail_generation.tasks.flow_matching import FlowMatching
from lightrail_starter.callbacks.ema import EMA


def quadrants(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures of 8 by 8 pixels with one bright quarter, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = 0.1 * torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = label // 2 * 4, label % 2 * 4
        image[0, top : top + 4, left : left + 4] += 0.5 + 0.4 * torch.rand(1, generator=generator)
    return images, labels


class Pictures(LightningDataModule):
    """Quadrants, for training and test."""

    def __init__(self, *, labelled: bool = True, tested: bool = True, loader: Any = None) -> None:
        super().__init__()
        self.class_names = ["one", "two", "three", "four"]
        self.labelled = labelled
        self.loader = loader
        if not tested:
            self.test_dataloader = None  # type: ignore[assignment]

    def _loader(self, count: int, seed: int) -> Any:
        images, labels = quadrants(count, seed)
        return DataLoader(TensorDataset(*(images, labels) if self.labelled else (images,)), batch_size=32, shuffle=True)

    def train_dataloader(self) -> Any:
        return self.loader if self.loader is not None else self._loader(200, 0)

    def test_dataloader(self) -> Any:
        return self._loader(80, 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 40)


@pytest.fixture(scope="module")
def quality() -> SampleQuality:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 40)
        return SampleQuality.for_data(Pictures())


# What is measured.


def test_data_of_the_same_kind_are_measured_as_well_as_they_can_be(quality: SampleQuality):
    samples, labels = quadrants(120, seed=5)
    found = quality.measure(samples, labels)
    assert set(found) == {"kid", "frechet", "sliced_wasserstein", "accuracy"}
    assert found["accuracy"] == 1
    assert abs(found["kid"]) < 0.15
    assert quality.of_held_out.keys() == found.keys()
    assert quality.of_held_out["accuracy"] == 1


def test_every_measure_grows_with_what_is_wrong(quality: SampleQuality):
    samples, labels = quadrants(120, seed=5)
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    found = [quality.measure(samples + strength * noise, labels) for strength in (0, 0.3, 0.9)]
    for name in ("kid", "frechet", "sliced_wasserstein"):
        assert found[0][name] < found[1][name] < found[2][name]
    assert found[0]["accuracy"] >= found[1]["accuracy"] > found[2]["accuracy"]


def test_a_class_that_is_missing_shows_in_the_distances_but_not_in_the_accuracy(quality: SampleQuality):
    samples, labels = quadrants(160, seed=5)
    present = labels != 2
    whole, part = quality.measure(samples, labels), quality.measure(samples[present], labels[present])
    assert part["accuracy"] == 1
    assert all(part[name] > whole[name] + 0.02 for name in ("kid", "frechet", "sliced_wasserstein"))


def test_accuracy_is_about_what_was_asked_for(quality: SampleQuality):
    samples, labels = quadrants(40, seed=5)
    asked = labels.clone()
    asked[:10] = (asked[:10] + 1) % 4
    assert quality.measure(samples, asked)["accuracy"] == 0.75
    assert "accuracy" not in quality.measure(samples)
    assert quality.measure(samples[:1], labels[:1]) == {"accuracy": 1}


def test_distances_do_not_depend_on_the_scale_of_the_features(quality: SampleQuality):
    """Every feature counts in units of its own spread: a classifier that doubles all of them changes nothing."""
    other = copy.deepcopy(quality.classifier)
    assert other is not None
    other.body[-2].weight.mul_(2)  # type: ignore[index, union-attr]
    other.body[-2].bias.mul_(2)  # type: ignore[index, union-attr]
    samples, _ = quadrants(60, seed=5)
    noisy = samples + 0.2
    found = SampleQuality(quality.reference, quality.labels, other).measure(noisy)
    assert math.isclose(found["kid"], quality.measure(noisy)["kid"], rel_tol=1e-4)
    assert math.isclose(found["frechet"], quality.measure(noisy)["frechet"], rel_tol=1e-4)


def test_points_are_compared_as_they_are():
    data = TwoMoons(samples=512)
    found = SampleQuality.for_data(data)
    points, labels = data.parts["test"].points, data.parts["test"].labels
    shifted = points + found.reference.std(0)
    # In units of the standard deviation the shift is (1, 1).
    assert abs(found.measure(shifted, labels)["frechet"] - found.measure(points, labels)["frechet"] - 2) < 0.4
    assert found.of_held_out["accuracy"] > 0.9


def test_without_labels_only_the_samples_themselves_are_compared():
    found = SampleQuality.for_data(Pictures(labelled=False))
    assert found.classifier is None
    assert set(found.measure(quadrants(20)[0])) == {"sliced_wasserstein"}
    assert set(found.of_held_out) == {"sliced_wasserstein"}


def test_samples_that_are_not_finite_are_not_measured(quality: SampleQuality):
    samples, labels = quadrants(20)
    samples[3, 0, 0, 0] = math.inf
    found = quality.measure(samples, labels)
    assert set(found) == {"kid", "frechet", "sliced_wasserstein", "accuracy"}
    assert all(math.isnan(value) for value in found.values())


# What is read and kept.


def test_the_reference_is_the_training_set_in_its_own_order(quality: SampleQuality):
    images, labels = quadrants(200)
    assert torch.equal(quality.reference, images)
    assert quality.labels is not None
    assert torch.equal(quality.labels, labels)
    assert quality.held_out is not None
    assert torch.equal(quality.held_out[0], quadrants(80, 1)[0])
    assert SampleQuality.for_data(Pictures(tested=False)).of_held_out == {}


def test_of_a_large_training_set_a_part_is_read_that_holds_every_class(monkeypatch: pytest.MonkeyPatch):
    images = quadrants(200)[0]
    places = {tuple(image.flatten().tolist()): place for place, image in enumerate(images)}
    # Every fourth, or every tenth, would be of one class or two.
    for name, limit, count in (("SAMPLES_AT_MOST", 50, 50), ("NUMBERS_AT_MOST", 64 * 20, 20)):
        monkeypatch.setattr(sample_quality, name, limit)
        found = SampleQuality.for_data(Pictures())
        chosen = [places[tuple(image.flatten().tolist())] for image in found.reference]
        assert len(set(chosen)) == count
        assert chosen == sorted(chosen)
        assert max(np.diff([0, *chosen, 199])) < 6 * 200 / count
        assert found.labels is not None
        assert set(found.labels.tolist()) == {0, 1, 2, 3}
        assert [place % 4 for place in chosen] == found.labels.tolist()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(quadrants(120)[0])


def test_any_loader_of_samples_will_do(monkeypatch: pytest.MonkeyPatch):
    images, labels = quadrants(120)
    chosen = list(range(7, 100, 3))
    subset = DataLoader(TensorDataset(images, labels), batch_size=8, sampler=SubsetRandomSampler(chosen))
    assert torch.equal(SampleQuality.for_data(Pictures(loader=subset)).reference, images[chosen])
    bare: Any = list(images.split(16))  # batches that are tensors, in no DataLoader
    assert torch.equal(SampleQuality.for_data(Pictures(loader=bare)).reference, images)
    monkeypatch.setattr(sample_quality, "SAMPLES_AT_MOST", 32)
    stream = DataLoader(Stream(), batch_size=16)
    assert torch.equal(SampleQuality.for_data(Pictures(loader=stream)).reference, images[:32])
    targets = DataLoader(TensorDataset(images, torch.rand(120)), batch_size=16)
    assert SampleQuality.for_data(Pictures(loader=targets)).labels is None


@pytest.mark.parametrize("batches", [[], [torch.zeros(4, 9, dtype=torch.long)], [{"x": torch.zeros(4, 2)}]])
def test_data_without_samples_are_refused(batches: Any):
    with pytest.raises(CompositionError):
        SampleQuality.for_data(Pictures(loader=batches))


def test_the_classifier_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, labels = quadrants(100)
    first = trained_classifier(images, labels, 4, tmp_path)
    assert (tmp_path / "quality.safetensors").is_file()
    anew = trained_classifier(images, labels, 4)
    monkeypatch.setattr(classifier, "_trained", None)  # so that training again would fail
    found = trained_classifier(images, labels, 4, tmp_path)
    for other in (found, anew):
        assert torch.equal(other(images), first(images))
        assert not other.training
    # Other data, another number of classes and a broken file are not taken for it.
    for change in (
        lambda: (images + 0.01, labels, 4),
        lambda: (images, labels.flip(0), 4),
        lambda: (images, labels, 5),
    ):
        with pytest.raises(TypeError):
            trained_classifier(*change(), tmp_path)
    (tmp_path / "quality.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(TypeError):
        trained_classifier(images, labels, 4, tmp_path)


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path):
    images, labels = quadrants(40)
    assert trained_classifier(images, labels, 4, tmp_path / "nowhere")(images).shape == (40, 4)


class Augmented(Dataset[Any]):
    """Pictures that are a little different each time."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        image, label = quadrants(40)[0][index], index % 4
        return image + 0.01 * (torch.rand(1) + np.random.rand() + random.random()).float(), label


def test_no_random_number_of_the_caller_is_used(tmp_path: Path):
    def drawn() -> tuple[Any, ...]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = drawn()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    loader = DataLoader(Augmented(), batch_size=16, shuffle=True)
    found = SampleQuality.for_data(Pictures(loader=loader), tmp_path)
    SampleQuality.for_data(Pictures(), tmp_path)
    SampleQuality.for_data(Pictures(), tmp_path)  # now it is read
    found.measure(*quadrants(20))
    assert drawn() == expected


def test_it_works_where_gradients_are_off():
    with torch.inference_mode():
        found = SampleQuality.for_data(Pictures())
    assert found.measure(*quadrants(20, 3))["accuracy"] == 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 4, 4), (3, 64, 64), (2, 17, 9), (7,), (5, 2)])
def test_a_classifier_takes_samples_of_any_shape(shape: tuple[int, ...]):
    made = classifier.FeatureClassifier(shape, 3)
    assert made.features(torch.randn(4, *shape)).shape == (4, 64)
    assert made(torch.randn(4, *shape)).shape == (4, 3)


class SetUp(TwoMoons):
    """Notes each time that it is set up, which might draw another split."""

    def setup(self, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]


def test_data_that_a_trainer_has_set_up_are_not_set_up_again_for_training():
    alone = SetUp(samples=256)
    SampleQuality.for_data(alone)
    assert alone.stages == ["fit", "test"]
    data = SetUp(batch_size=64, samples=256)
    with quiet_trainer(max_epochs=1, callbacks=[probe()]) as trainer:
        trainer.fit(task(), datamodule=data)
    assert data.stages == ["fit", "test"]


# What is drawn.


def test_a_grid_has_a_column_a_class_and_frames_what_is_not_recognised(quality: SampleQuality):
    samples, labels = quadrants(24, seed=5)
    asked = labels.clone()
    asked[5] = 3
    figure = quality.figures(samples, asked)["samples"]
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["one", "two", "three", "four"]
    # Five rows of four, since one class was asked for five times; nine pixels from one picture to the next.
    assert axes.images[0].get_array().shape == (5 * 9 - 1, 4 * 9 - 1, 3)  # type: ignore[union-attr]
    assert len(axes.lines) == 1
    left, top = axes.lines[0].get_xydata()[0]  # type: ignore[index]
    assert (left, top) == (3 * 9 - 0.5, 1 * 9 - 0.5)
    assert "recognised 95.8%" in figure.get_suptitle()
    assert "held-out" in figure.get_suptitle()


def test_pixels_stand_where_they_are(quality: SampleQuality):
    samples, _ = quadrants(12, seed=5)
    page = quality.figures(samples)["samples"].axes[0].images[0].get_array()
    low, high = quality.limits
    assert np.allclose(page[9:17, 9:17, 0], ((samples[11, 0] - low) / (high - low)).clip(0, 1), atol=1e-6)  # type: ignore[index]
    assert (page[8] == 1).all()  # type: ignore[index]


def test_coloured_images_points_and_other_samples_are_shown_as_they_can_be():
    coloured = SampleQuality(torch.rand(30, 3, 8, 8))
    assert "samples" in coloured.figures(torch.rand(5, 3, 8, 8))
    points = SampleQuality(torch.rand(30, 2))
    figure = points.figures(torch.rand(9, 2), torch.arange(9) % 2)["samples"]
    assert len(figure.axes[0].collections) == 3  # the data, and two classes
    moons = TwoMoons(samples=4096).parts["train"]
    shown = SampleQuality(moons.points).figures(torch.rand(9, 2))["samples"].axes[0].collections[0].get_offsets()
    both = {tuple(point): int(label) for point, label in zip(moons.points.tolist(), moons.labels, strict=True)}
    assert abs(np.mean([both[tuple(point)] for point in np.asarray(shown).tolist()]) - 0.5) < 0.05
    assert "samples" in SampleQuality(torch.rand(30, 1)).figures(torch.rand(9, 1))
    assert SampleQuality(torch.rand(30, 5, 7)).figures(torch.rand(9, 5, 7)) == {}


# The probe.


class Seen(DummyLogger):
    """What a logger is given, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:  # type: ignore[override]
        self.rows.setdefault(step, {}).update({k: v for k, v in metrics.items() if "samples/" in k})


class Weights(Callback):
    """The weights that each validation saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(copy.deepcopy(pl_module.state_dict()))


def task(**options: Any) -> Any:
    torch.manual_seed(1)
    made = FlowMatching(PointMLP(2, 2, width=16, depth=1), **options)
    made.configure_optimizers = lambda: torch.optim.Adam(made.parameters(), lr=0.01)  # type: ignore[method-assign]
    return made


def fitted(*callbacks: Callback, epochs: int = 4, checkpoint: Path | None = None, save: Path | None = None) -> Any:
    trained, seen = task(), Seen()
    data = TwoMoons(batch_size=64, samples=256)
    with quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), num_sanity_val_steps=1) as trainer:
        trainer.loggers = [seen]
        torch.manual_seed(2)
        trainer.fit(trained, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if save is not None:
            trainer.save_checkpoint(save)
        trainer.test(trained, datamodule=data, verbose=False)
    return trained, {step: row for step, row in seen.rows.items() if row}, torch.rand(3)


def probe(**options: Any) -> SampleQualityProbe:
    return SampleQualityProbe(**{"every": 1, "count": 40, "steps": 4, "sampler": "ddim", **options})


def test_a_run_with_a_probe_ends_where_one_without_it_does():
    plain, nothing, after = fitted()
    probed, rows, also_after = fitted(probe())
    assert not nothing
    assert len(rows) == 5
    assert torch.equal(after, also_after)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, probed.state_dict()[name]), name


def test_all_measures_are_logged_when_they_are_due():
    steps = {step: set(row) for step, row in fitted(probe(every=3), epochs=5)[1].items()}
    names = {"kid", "frechet", "sliced_wasserstein", "accuracy"}
    during, at_end = {f"samples/{name}" for name in names}, {f"test_samples/{name}" for name in names}
    # Four batches an epoch: after the third, and after the last, when the test follows.
    assert steps == {11: during, 19: during, 20: at_end}


def test_eight_probes_a_run_where_nothing_is_said():
    found = probe(every=None)
    with quiet_trainer(max_epochs=33) as trainer:
        assert found._interval(trainer) == 5
    with quiet_trainer(max_epochs=3) as trainer:
        assert found._interval(trainer) == 1
    with quiet_trainer(max_epochs=-1, max_steps=10) as trainer:
        assert found._interval(trainer) == 1


def test_the_weights_are_those_that_validation_sees_whatever_the_order_of_callbacks():
    for ordered in (lambda ema, mine, seen: (ema, mine, seen), lambda ema, mine, seen: (mine, ema, seen)):
        mine, seen = probe(), Weights()
        fitted(*ordered(EMA(decay=0.9, warmup=False), mine, seen), epochs=2)
        probed = [moment.samples for moment in mine._moments]
        average = task()
        average.load_state_dict(seen.seen[-1])
        with quiet_trainer() as trainer:
            expected, labels = probe()._draw(trainer, average)
        assert torch.equal(probed[-1], expected)
        assert labels is not None
        assert labels.tolist() == [0, 1] * 20
        assert not torch.equal(probed[0], probed[1])


def test_samples_do_not_depend_on_how_many_are_drawn_at_a_time_or_where():
    trained, _, _ = fitted(epochs=1)
    with quiet_trainer() as trainer:
        whole, labels = probe(count=11)._draw(trainer, trained)
        parts, _ = probe(count=11, batch_size=4)._draw(trainer, trained)
        other, _ = probe(count=11, sample_seed=1)._draw(trainer, trained)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole, other, atol=1e-2)
    trained.center += 100  # in the data's own units the same samples lie elsewhere
    with quiet_trainer() as trainer:
        assert torch.allclose(probe(count=11)._draw(trainer, trained)[0], whole + 100, atol=1e-3)
    trained.center -= 100

    class Rank:
        """One of two processes, which knows what the other one will say."""

        world_size, said = 2, {}

        def __init__(self, rank: int) -> None:
            self.global_rank, self.strategy, self.calls = rank, self, 0

        def all_gather(self, mine: Tensor) -> Tensor:
            self.calls += 1
            self.said[self.global_rank, self.calls] = mine
            other = self.said.get((1 - self.global_rank, self.calls), mine)
            return torch.stack([mine, other] if self.global_rank == 0 else [other, mine])

    probe(count=11)._draw(Rank(0), trained)  # type: ignore[arg-type]
    gathered, their_labels = probe(count=11)._draw(Rank(1), trained)  # type: ignore[arg-type]
    assert torch.allclose(whole, gathered, atol=1e-5)
    assert torch.equal(labels, their_labels)  # type: ignore[arg-type]


def test_a_resumed_run_shows_what_was_seen_before(tmp_path: Path):
    whole, first, again = probe(), probe(), probe()
    fitted(whole)
    fitted(first, epochs=2, save=tmp_path / "two.ckpt")
    fitted(again, checkpoint=tmp_path / "two.ckpt")
    assert [moment.epoch for moment in again._moments] == [1, 2, 3, 4]
    for mine, theirs in zip(again._moments[:2], whole._moments[:2], strict=True):
        assert torch.equal(mine.samples, theirs.samples)
        assert mine.measured == theirs.measured


def test_figures_show_the_samples_and_how_they_came_to_be():
    found = probe()
    assert found.figures() == {}
    fitted(found, epochs=3)
    figures = found.figures()
    assert set(figures) == {"samples", "samples_over_training"}
    titles = [axes.get_title() for axes in figures["samples_over_training"].axes]
    assert [title.split("\n")[0] for title in titles] == ["epoch 1", "epoch 2", "epoch 3"]
    assert all("recognised" in title for title in titles)
    for figure in figures.values():
        figure.canvas.draw()  # type: ignore[attr-defined]


def test_a_long_run_keeps_few_moments_evenly():
    found = probe()
    fitted(found, epochs=1)
    first = found._moments[0]
    for epoch in range(2, 101):
        found._remember(dataclasses.replace(first, epoch=epoch))
    epochs = [moment.epoch for moment in found._moments]
    assert len(epochs) == 16
    assert (epochs[0], epochs[-1]) == (1, 100)
    assert max(np.diff(epochs)) <= 12
    assert len(found.figures()["samples_over_training"].axes) == 8


class Bare(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_cannot_work_is_refused_before_training():
    with quiet_trainer(max_epochs=1, callbacks=[probe()]) as trainer, pytest.raises(CompositionError, match="samples"):
        trainer.fit(Bare(), datamodule=TwoMoons())
    data = TwoMoons(batch_size=64, samples=256)
    with quiet_trainer(max_epochs=1, callbacks=[probe()]) as trainer, pytest.raises(CompositionError, match="measure"):
        trainer.fit(task(), train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader())


@pytest.mark.parametrize("options", [{"every": 0}, {"count": 1}, {"steps": 0}, {"batch_size": 0}, {"sample_seed": -1}])
def test_options_out_of_range_are_refused(options: Any):
    with pytest.raises(ConfigurationError):
        SampleQualityProbe(**options)
