"""Handwritten digits as a whole run, for what changes how a run goes."""

from __future__ import annotations

from lightrail.bench.claims.problem import RunProblem
from lightrail.traits import Traits

__all__ = ["DigitsRun"]


class DigitsRun(RunProblem):
    """``train`` on the digits of scikit-learn with a small perceptron, 16 a batch, 12 times over.

    Example:
        >>> DigitsRun.passes  # 1257 images, 16 a batch
        948
    """

    traits = Traits(rule="cross entropy of ten classes, a perceptron, 12 epochs, 16 images a batch; steps are counted")
    passes = 12 * 79
    overrides = ("data=digits", "model=mlp", "data.batch_size=16", "trainer.max_epochs=12", "optimizer=adamw")
