"""Handwritten digits, small enough to train many times over."""

from __future__ import annotations

from lightrail.bench.claims.problem import TaskProblem
from lightrail.traits import Traits
from lightrail_starter.data.digits import Digits
from lightrail_starter.models.cnn import CNN
from lightrail_starter.tasks.classification import Classification

__all__ = ["DigitsProblem"]


class DigitsProblem(TaskProblem):
    """A small convolutional network on the handwritten digits of scikit-learn, 32 a batch.

    Example:
        >>> problem = DigitsProblem()
        >>> 2 < problem.merit() < 3
        True
    """

    traits = Traits(rule="cross entropy of ten classes, a small CNN, 32 images a batch")
    passes = 150

    def __init__(self) -> None:
        super().__init__(Classification(CNN(in_channels=1, out_features=10)), Digits(batch_size=32))
