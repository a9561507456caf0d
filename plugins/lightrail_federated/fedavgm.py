"""Federated averaging with momentum at the server."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.federated import Heard, State
from lightrail.options import between, positive
from lightrail_federated.adaptive_server import momentum_step
from lightrail_federated.fedavg import FedAvg

__all__ = ["FedAvgM"]


class FedAvgM(FedAvg):
    r"""FedAvg whose server goes on in the direction of the rounds before.

    .. math:: m \leftarrow \beta m + \Delta, \qquad \theta \leftarrow \theta + \eta m, \qquad
              \Delta = \sum_{k \in S} \frac{n_k}{n_S} (y_k - \theta)

    With β = 0 and η = 1 it is FedAvg.

    Args:
        lr: η, of the server, greater than 0.
        momentum: β, in [0, 1).

    Raises:
        ConfigurationError: An option is out of range.

    Deviations:
        The paper's server has no learning rate: η = 1.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=fedavgm", "federated.momentum=0.5", "federated.clients=4", "logger=[]"]
        >>> compose(run).composition.config.federated.momentum
        0.5

    Reference:
        T.-M. H. Hsu, H. Qi and M. Brown (2019), Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification, arXiv 1909.06335, section 4.3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="m ← β m + Δ; θ ← θ + η m",
        paper="Hsu, Qi, Brown, 2019, Measuring the Effects of Non-Identical Data Distribution for Federated Visual "
        "Classification, arXiv 1909.06335",
        example={"clients": 4, "rounds": 2},
    )

    def __init__(self, *, lr: float = 1.0, momentum: float = 0.9, **common: Any) -> None:
        super().__init__(**common)
        positive(lr=lr)
        between(0.0, 1.0, momentum=momentum)
        self.lr, self.momentum = lr, momentum

    def start(self, weights: Tensor) -> State:
        return {"weights": weights, "m": torch.zeros_like(weights)}

    def server(self, server: State, mean: State, heard: Heard) -> State:
        if not mean:
            return server
        theta, m = momentum_step(server["weights"], server["m"], mean["update"], self.lr, self.momentum)
        return {"weights": theta, "m": m}
