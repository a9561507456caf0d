"""Handwritten digits over clients that each know few of them."""

from __future__ import annotations

from lightrail.bench.claims.problem import RunProblem
from lightrail.traits import Traits

__all__ = ["FederatedDigits"]


class FederatedDigits(RunProblem):
    """``train`` on the digits of scikit-learn over ten clients whose labels are skewed, in forty rounds.

    Example:
        >>> FederatedDigits.passes
        40
    """

    traits = Traits(
        rule="cross entropy of ten classes, a network of one hidden layer, 10 clients with labels from a Dirichlet "
        "distribution (α = 0.1), 40 rounds of 2 local epochs of SGD"
    )
    passes = 40
    overrides = (
        "data=digits",
        "data.batch_size=32",
        "model=mlp",
        "model.hidden=[64]",
        "optimizer=sgd",
        "schedule=null",
        "federated=fedavg",
        "federated.clients=10",
        "federated.rounds=40",
        "federated.local_epochs=2",
        "federated.partition=dirichlet",
        "federated.partition.alpha=0.1",
    )
