"""Small tasks that can answer everything a closure is asked."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrail.step.batches import leading_size
from lightrail.step.closure import Closure

__all__ = [
    "Classifier",
    "ComplexLeastSquares",
    "Linear",
    "NormalisedClassifier",
    "Problem",
    "Rosenbrock",
    "SparseEmbedding",
    "quadratic",
]

Batch = Any


class Problem(ABC):
    """A task with batches, parameters and a loss.

    Args:
        module: Whose parameters are optimized.
        sign: -1 turns the loss over, for methods that maximise.
    """

    closure_class: type[Closure] = Closure

    def __init__(self, module: nn.Module, sign: int = 1) -> None:
        self.module = module
        self.sign = sign

    @property
    def params(self) -> list[Tensor]:
        return list(self.module.parameters())

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        return list(self.module.named_parameters())

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step: the same at every call."""

    @abstractmethod
    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions and targets."""

    @abstractmethod
    def distance(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood, up to a constant, as a mean over the batch."""

    @abstractmethod
    def drawn(self, predictions: Tensor, generator: torch.Generator) -> Tensor:
        """Targets from the predictive distribution."""

    def outputs(self, batch: Batch) -> Tensor:
        """What the loss looks at."""
        return self.pair(batch)[0]

    def output_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of outputs that are given."""
        return self.sign * self.distance(outputs, self.targets(batch))

    def targets(self, batch: Batch) -> Tensor:
        """The targets alone."""
        with torch.no_grad():
            return self.pair(batch)[1]

    def sample_losses(self, batch: Batch) -> Tensor:
        """The loss of each sample."""
        predictions, targets = self.pair(batch)
        return torch.stack(
            [self.sign * self.distance(p[None], y[None]) for p, y in zip(predictions, targets, strict=True)]
        )

    def loss(self, batch: Batch) -> Tensor:
        return self.sign * self.distance(*self.pair(batch))

    def sampled_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        predictions, _ = self.pair(batch)
        return self.sign * self.distance(predictions, self.drawn(predictions.detach(), generator))

    def objectives(self, batch: Batch) -> list[Tensor]:
        predictions, targets = self.pair(batch)
        half = len(predictions) // 2
        parts = (slice(None, half), slice(half, None))
        return [self.sign * self.distance(predictions[part], targets[part]) for part in parts]

    def clusters(self, batch: Batch) -> Tensor:
        """Three clusters, sample by sample in turn."""
        return torch.arange(leading_size(batch) or 0) % 3

    def closure(self, *batches: Batch) -> Closure:
        """A closure over one accumulation window."""
        return self.closure_class(
            self.loss,
            self.params,
            *batches,
            module=self.module,
            sampled_loss_fn=self.sampled_loss,
            objectives_fn=self.objectives,
            clusters_fn=self.clusters,
            sample_losses_fn=self.sample_losses,
            outputs_fn=self.outputs,
            output_loss_fn=self.output_loss,
        )

    def plain_closure(self, optimizer: Optimizer, step: int, set_to_none: bool = True) -> Callable[[], Tensor]:
        """torch's own closure for the batch of a step."""

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=set_to_none)
            with torch.enable_grad():
                loss = self.loss(self.batch(step))
                loss.backward()
            return loss.detach()

        return closure

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Regression(Problem):
    """Least squares, which is a Gaussian likelihood of unit variance."""

    def distance(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - targets).abs().square().mean() / 2

    def drawn(self, predictions: Tensor, generator: torch.Generator) -> Tensor:
        return predictions + torch.randn(predictions.shape, generator=generator, dtype=predictions.dtype)


class Linear(_Regression):
    """Predicts the inner product of the parameters with fixed features; convex, with parameters of any shape.

    Args:
        values: The parameters at the start, by name; they are taken as they are, strides included.
        frozen: Names of those that ask for no gradient.
        sign: As for :class:`Problem`.

    ``skip`` names parameters that the loss leaves out from then on, so that their gradient is ``None``.
    """

    rows = 64

    def __init__(self, values: dict[str, Tensor], frozen: Iterable[str] = (), sign: int = 1) -> None:
        module = nn.Module()
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=name not in frozen))
        super().__init__(module, sign)
        self.skip: set[str] = set()
        some = next(iter(values.values()))
        generator = _generator(1)
        self._features = {
            name: self._scaled(torch.randn(self.rows, *v.shape, generator=generator, dtype=torch.float64)).to(
                some.dtype
            )
            for name, v in values.items()
        }
        self._targets = sum(
            (f.double().reshape(self.rows, f[0].numel()).sum(1) for f in self._features.values()),
            start=torch.zeros(self.rows, dtype=torch.float64),
        ).to(some.dtype)

    @staticmethod
    def _scaled(features: Tensor) -> Tensor:
        """Columns of unequal length, so that the curvature differs 25-fold between coordinates."""
        size = features[0].numel()
        return (features.reshape(len(features), size) * torch.linspace(0.4, 2.0, size, dtype=features.dtype)).reshape(
            features.shape
        )

    def batch(self, step: int) -> Batch:
        return torch.arange(self.rows)

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        used = [(self._features[name][batch], p) for name, p in self.named if name not in self.skip]
        terms = [(features * p).reshape(len(batch), p.numel()).sum(1) for features, p in used]
        return torch.stack(terms).sum(0), self._targets[batch]


def quadratic() -> Linear:
    """A strongly convex quadratic of twelve unknowns in a 4 × 3 matrix, in double precision."""
    return Linear({"weight": torch.zeros(4, 3, dtype=torch.float64)})


class Rosenbrock(_Regression):
    """Rosenbrock's valley over a hundred, from two points at once, as nonlinear least squares in double precision.

    The points are the rows of a matrix, so that methods for matrices have one to work on.
    """

    def __init__(self) -> None:
        module = nn.Module()
        start = torch.tensor([[-1.2, 1.0], [0.5, -0.5]], dtype=torch.float64)
        module.register_parameter("weight", nn.Parameter(start))
        super().__init__(module)

    def batch(self, step: int) -> Batch:
        return torch.arange(16) % 4

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        (points,) = self.params
        x, y = points.unbind(1)
        residuals = torch.cat([2 * (y - x**2), 0.2 * (1 - x)])
        return residuals[batch], torch.zeros(len(batch), dtype=torch.float64)


class Classifier(Problem):
    """A small network on three noisy classes; another batch of sixteen each step.

    Args:
        dtype: Of the parameters and the data.
        widths: Of the hidden layers.
        sign: As for :class:`Problem`.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, widths: Sequence[int] = (8,), sign: int = 1) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            layers: list[nn.Module] = []
            for fan_in, width in itertools.pairwise((6, *widths)):
                layers += self._layer(fan_in, width)
            module = nn.Sequential(*layers, head := nn.Linear(widths[-1], 3))
        with torch.no_grad():
            head.weight.mul_(6)  # confidently wrong at first: gradients have a norm above one, which thresholds meet
        super().__init__(module.to(dtype), sign)
        self.dtype = dtype

    def _layer(self, fan_in: int, width: int) -> list[nn.Module]:
        return [nn.Linear(fan_in, width), nn.Tanh()]

    def batch(self, step: int) -> Batch:
        generator = _generator(100 + step)
        targets = torch.randint(3, (16,), generator=generator)
        inputs = torch.randn(16, 6, generator=generator) + nn.functional.one_hot(targets, 6)
        return inputs.to(self.dtype), targets

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return self.module(inputs), targets

    def distance(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(predictions, targets)

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def drawn(self, predictions: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(predictions.float().softmax(-1), 1, generator=generator).squeeze(-1)


class NormalisedClassifier(Classifier):
    """The same with BatchNorm and dropout: what an evaluation moves besides gradients."""

    def _layer(self, fan_in: int, width: int) -> list[nn.Module]:
        return [nn.Linear(fan_in, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3)]


class SparseEmbedding(_Regression):
    """A table of which a step sees a few rows, with sparse gradients."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            module = nn.Embedding(10, 4, sparse=True)
        super().__init__(module)

    def batch(self, step: int) -> Batch:
        return torch.tensor([1, 3, 3, 7, 0, 2, 1, 5])

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.module(batch).sum(-1), torch.ones(len(batch))


class ComplexLeastSquares(_Regression):
    """Linear least squares in a complex 3 × 2 matrix."""

    def __init__(self) -> None:
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64)))
        super().__init__(module)
        self._features = torch.randn(32, 6, generator=_generator(2), dtype=torch.complex64)

    def batch(self, step: int) -> Batch:
        return self._features

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        (weight,) = self.params
        return batch @ weight.flatten(), batch.sum(1) * (1 - 1j)
