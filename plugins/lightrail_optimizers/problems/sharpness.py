"""How flat the place is where training ends, among the many that fit the data."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.step import Closure
from lightrail.step.curvature import extreme_eigenvalues
from lightrail.traits import Traits

__all__ = ["Sharpness"]

_FITTED = 0.05
_SAMPLES, _BATCH, _WIDTH = 256, 64, 64


class Sharpness(Problem):
    """256 handwritten digits, fitted by a network with room to spare; the merit is the Hessian's top eigenvalue.

    The loss is half the squared error of one-hot labels: unlike cross entropy, whose Hessian vanishes wherever the
    samples are well separated, it keeps its curvature at a loss of zero, so that training longer flattens nothing.
    The eigenvalue is of the loss over all samples, times ``max(1, loss / 0.05)``: a network that has not learnt yet
    is flat for nothing. AdamW ends near a loss of 0.005.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> Sharpness().merit() > 10
        True
    """

    traits = Traits(
        rule="squared error of 10 classes, 256 digits, 64 tanh units, 64 images a batch; "
        "the eigenvalue counts L/0.05-fold above a training loss L of 0.05"
    )
    passes = 2000
    merit_name = "top Hessian eigenvalue"

    def __init__(self) -> None:
        images, labels = _digits()
        rows = torch.randperm(len(images))[:_SAMPLES]
        self._x, self._y = images[rows], labels[rows]
        self._module = nn.Sequential(nn.Linear(64, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 10))
        # Batches of their own stream: a method's draws change none of them.
        self._batches = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self._module.named_parameters())

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(self._module(batch[0]), batch[1]) * 10 / 2

    def closure(self, step: int) -> CountedClosure:
        rows = torch.randint(_SAMPLES, (_BATCH,), generator=self._batches)
        return CountedClosure(self._loss, [p for _, p in self.named_parameters()], (self._x[rows], self._y[rows]))

    def merit(self) -> float:
        params = [p for _, p in self.named_parameters()]
        closure = Closure(self._loss, params, (self._x, self._y))
        # One large eigenvalue for each class, close together: the first pause of Lanczos is not its end.
        _, largest = extreme_eigenvalues(closure.hvp, params, steps=40, tolerance=0.0)
        return largest * max(1.0, float(closure.loss()) / _FITTED)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """1797 images of 64 pixels, centred, and their labels as one-hot vectors."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32) / 16
    return images - images.mean(0), one_hot(torch.as_tensor(labels), 10).float()
