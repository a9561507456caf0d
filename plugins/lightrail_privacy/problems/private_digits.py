"""Softmax regression on handwritten digits, under a privacy budget."""

from __future__ import annotations

from lightrail.bench.claims.problem import RunProblem
from lightrail.traits import Traits

__all__ = ["PrivateDigits"]


class PrivateDigits(RunProblem):
    """``train`` on the digits of scikit-learn with one linear layer, a tenth of the images a step.

    Example:
        >>> PrivateDigits.passes
        200
    """

    traits = Traits(rule="cross entropy of ten classes, one linear layer, 126 of 1259 images a step, 200 steps of SGD")
    passes = 200
    overrides = (
        "data=digits",
        "data.batch_size=126",
        "model=mlp",
        "model.hidden=[]",
        "optimizer=sgd",
        "schedule=null",
        "trainer.max_steps=200",
    )
