"""How good samples are, measured against the data that they are to look like."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightrail.errors import CompositionError
from lightrail.step.randomness import RandomState
from lightrail_generation.quality.classifier import FeatureClassifier, trained_classifier
from lightrail_generation.quality.distances import frechet_distance, kernel_distance, sliced_wasserstein

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SampleQuality"]

SAMPLES_AT_MOST = 10_000
NUMBERS_AT_MOST = 2**26  # of the reference set, in all
SHOWN_A_CLASS, SHOWN = 6, 60
COLUMNS = 10


class SampleQuality:
    """Measures samples against a reference set: the data that a model was trained on.

    ``kid`` and ``frechet`` compare features, in units of their standard deviation in the reference set: of images those
    of a small classifier that is trained on it, of points the numbers themselves. ``sliced_wasserstein`` compares the
    samples as they are. ``accuracy`` is the share of samples that the classifier takes for the class that was asked
    for. Sets that hold all classes in equal shares, as generated ones do, are spread more evenly than chance would
    have it, so a perfect ``kid`` lies a little below 0.

    Args:
        reference: ``[M, …]``, in the data's own units.
        labels: ``[M]``; without them there is no classifier.
        classifier: Of the reference set.
        held_out: Data that no model was trained on, with labels, to say what perfect samples would get.
        names: Of the classes.
    """

    def __init__(
        self,
        reference: Tensor,
        labels: Tensor | None = None,
        classifier: FeatureClassifier | None = None,
        held_out: tuple[Tensor, Tensor | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.reference = reference
        self.labels = labels
        self.classifier = classifier
        self.held_out = held_out
        self.names = tuple(names) if names is not None else ()

    @classmethod
    def for_data(cls, data: LightningDataModule, folder: Path | None = None) -> SampleQuality:
        """Against the training set of these data; draws nothing from the random numbers of a run.

        Args:
            data: Whose batches are samples, or samples with labels ``[B]``.
            folder: Where the classifier is kept as ``quality.safetensors``, and found again.

        Raises:
            CompositionError: The batches are something else.
        """
        with RandomState.kept():
            reference, labels, held_out = _read_all(data)
        names: Any = getattr(data, "class_names", None)
        classifier = None
        if labels is not None and int(labels.max()) > 0:
            classifier = trained_classifier(reference, labels, int(labels.max()) + 1, folder)
        return cls(reference, labels, classifier, held_out, names)

    def measure(self, samples: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """How good these samples are, by name; ``kid``, ``frechet`` and ``accuracy`` only where there is a classifier.

        Args:
            samples: ``[N, …]`` in the data's own units; of a single one only the accuracy is known.
            labels: ``[N]``: what was asked for; without it there is no accuracy.
        """
        samples = samples.detach().cpu().float()
        if not bool(samples.isfinite().all()):
            return dict.fromkeys(self.measures(labels is not None), float("nan"))
        found = {}
        if len(samples) > 1:
            if self.classifier is not None:
                features = self._features(samples)
                found["kid"] = kernel_distance(features, self._reference_features)
                found["frechet"] = frechet_distance(features, self._reference_features)
            found["sliced_wasserstein"] = sliced_wasserstein(samples, self.reference)
        if self.classifier is not None and labels is not None:
            found["accuracy"] = float(self._recognised(samples, labels).double().mean())
        return found

    def measures(self, has_labels: bool) -> tuple[str, ...]:
        """What :meth:`measure` gives."""
        if self.classifier is None:
            return ("sliced_wasserstein",)
        return ("kid", "frechet", "sliced_wasserstein", *(["accuracy"] if has_labels else []))

    @functools.cached_property
    def of_held_out(self) -> dict[str, float]:
        """What data that no model has seen would get: as good as it can be."""
        return {} if self.held_out is None else self.measure(*self.held_out)

    def figures(self, samples: Tensor, labels: Tensor | None = None) -> dict[str, Figure]:
        """``samples``: a grid of images with one column a class, or points over the data.

        Args:
            samples: ``[N, …]`` in the data's own units.
            labels: ``[N]``: what was asked for.
        """
        from lightrail_generation.quality.pictures import is_image, sample_grid, scatter

        samples = samples.detach().cpu().float()
        labels = None if labels is None else labels.cpu()
        title = self.caption(self.measure(samples, labels))
        if is_image(samples.shape[1:]):
            order, columns, headings = _by_class(labels, len(samples), self.name_of)
            marked: list[int] = []
            if labels is not None and self.classifier is not None:
                marked = (~self._recognised(samples[order], labels[order])).nonzero()[:, 0].tolist()
            shown = samples[order]
            return {"samples": sample_grid(shown, columns, headings, title, marked, self.limits)}
        if samples.ndim == 2:
            names = [self.name_of(int(label)) for label in ([] if labels is None else labels.unique())]
            return {"samples": scatter(samples, labels, self.reference, names, title)}
        return {}

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value in the data."""
        return float(self.reference.min()), float(self.reference.max())

    def name_of(self, label: int) -> str:
        """What a class is called."""
        return str(self.names[label]) if label < len(self.names) else str(label)

    def caption(self, measured: Mapping[str, float]) -> str:
        """The measures in one line, each beside what held-out data get."""
        words = {"kid": "KID", "frechet": "Fréchet", "sliced_wasserstein": "sliced W₂", "accuracy": "recognised"}
        parts = [f"{words[name]} {_written(name, measured[name])}" for name in words if name in measured]
        best = [
            _written(name, self.of_held_out[name]) for name in words if name in measured and name in self.of_held_out
        ]
        return " · ".join(parts) + (f"\nheld-out data: {' · '.join(best)}" if best else "")

    def _features(self, samples: Tensor) -> Tensor:
        mean, deviation = self._spread
        return (self._raw_features(samples) - mean) / deviation

    def _raw_features(self, samples: Tensor) -> Tensor:
        if samples.ndim == 2 or self.classifier is None:
            return samples.flatten(1)
        with torch.no_grad():
            return torch.cat([self.classifier.features(part) for part in samples.split(512)])

    @functools.cached_property
    def _spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each feature of the reference set; of one that never moves, 1."""
        features = self._raw_features(self.reference)
        deviation = features.std(0)
        return features.mean(0), torch.where(deviation > 1e-3 * deviation.max(), deviation, 1.0)

    @functools.cached_property
    def _reference_features(self) -> Tensor:
        return self._features(self.reference)

    def _recognised(self, samples: Tensor, labels: Tensor) -> Tensor:
        assert self.classifier is not None
        with torch.no_grad():
            found = torch.cat([self.classifier(part).argmax(1) for part in samples.split(512)])
        return found == labels.cpu()


def _written(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3g}"


def _by_class(labels: Tensor | None, count: int, name_of: Any) -> tuple[list[int], int, list[str]]:
    """Which samples a grid shows, in which order, and how many columns it has, with their headings."""
    classes = [] if labels is None else labels.unique().tolist()
    if labels is None or not 1 < len(classes) <= 2 * COLUMNS:
        return list(range(min(count, SHOWN))), min(COLUMNS, count), []
    rows = [(labels == label).nonzero()[:SHOWN_A_CLASS, 0].tolist() for label in classes]
    depth = min(map(len, rows))
    order = [rows[column][line] for line in range(depth) for column in range(len(classes))]
    return order, len(classes), [name_of(label) for label in classes]


def _read_all(data: LightningDataModule) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor | None] | None]:
    """Samples and labels for training, and both for test where there is one."""
    if data.trainer is None:  # else the trainer has done it, and another set-up might be another split
        data.prepare_data()
        data.setup("fit")
    reference, labels = _read(data.train_dataloader())
    if not is_overridden("test_dataloader", data):
        return reference, labels, None
    data.setup("test")
    return reference, labels, _read(data.test_dataloader())


def _read(loader: Any) -> tuple[Tensor, Tensor | None]:
    """As many samples of a data set as are to be kept, drawn from all of it, in its order; of a stream the first."""
    parts: list[tuple[Tensor, Tensor | None]] = []
    count = 0
    for batch in _batches(loader):
        samples, labels = _split(batch)
        parts.append((samples.detach().float().cpu(), labels))
        count += len(samples)
        if count >= _at_most(samples):
            break
    if not parts:
        raise _no_samples("no batch")
    samples = torch.cat([part for part, _ in parts])
    labels = [each for _, each in parts if each is not None]
    return samples, torch.cat(labels).long().cpu() if len(labels) == len(parts) else None


def _at_most(samples: Tensor) -> int:
    return min(SAMPLES_AT_MOST, max(1, NUMBERS_AT_MOST // samples[0].numel()))


def _batches(loader: Any) -> Iterator[Any]:
    """The batches of a loader; in order and in this process where its data set can be indexed."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        yield from loader
        return
    dataset: Any = loader.dataset
    collate, size = loader.collate_fn, loader.batch_size or 1
    read_all: Any = getattr(dataset, "__getitems__", None)

    def read(indices: Sequence[int]) -> Any:
        samples: Any = read_all(indices) if callable(read_all) else [dataset[i] for i in indices]
        return collate(samples)

    pool: Sequence[int] = getattr(loader.sampler, "indices", range(len(dataset)))
    count = min(len(pool), _at_most(_split(read(pool[:1]))[0])) if len(pool) else 0
    # At random, for every so-manieth sample may be of one class.
    places = range(count) if count == len(pool) else np.sort(np.random.RandomState(0).permutation(len(pool))[:count])
    chosen = [int(pool[int(place)]) for place in places]
    for start in range(0, count, size):
        yield read(chosen[start : start + size])


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        batch = (batch,)
    if not isinstance(batch, Sequence) or not isinstance(batch[0], Tensor) or not batch[0].is_floating_point():
        raise _no_samples(type(batch).__name__)
    labels = batch[1] if len(batch) > 1 else None
    is_labels = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    return batch[0], labels if is_labels else None


def _no_samples(found: str) -> CompositionError:
    return CompositionError(
        "samples cannot be measured against these data",
        found=f"a training set that yields {found}",
        allowed="batches of samples [B, …] of floating-point numbers, or of samples with labels [B]",
        remedy="Choose such data, or leave out what measures samples.",
    )
