"""Federated averaging with a server that steps as Yogi does."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightrail import Traits
from lightrail_federated.adaptive_server import DecayingServer, yogi_moment

__all__ = ["FedYogi"]


class FedYogi(DecayingServer):
    r"""FedAvg with the mean update Δ in the place of Yogi's negative gradient.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) \Delta, \qquad
              v \leftarrow v - (1 - \beta_2) \Delta^2 \operatorname{sign}(v - \Delta^2)

    .. math:: \theta \leftarrow \theta + \eta \frac{m}{\sqrt{v} + \tau}, \qquad
              \Delta = \sum_{k \in S} \frac{n_k}{n_S} (y_k - \theta)

    with m = 0 and v = τ² at first. There is no correction of the first rounds' bias, as in the paper.

    Args:
        lr: η, of the server, greater than 0.
        beta1: β₁, in [0, 1).
        beta2: β₂, in [0, 1).
        tau: τ, greater than 0: how much of the step is adaptive.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=fedyogi", "federated.lr=0.03", "federated.clients=4", "federated.rounds=1", "logger=[]"]
        >>> compose(run).composition.config.federated.beta2
        0.99

    Reference:
        S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar and H. B. McMahan (2021), Adaptive
        Federated Optimization, ICLR, arXiv 2003.00295, algorithm 2.
    """

    traits: ClassVar[Traits] = Traits(
        rule="v ← v - (1 - β₂) Δ² sign(v - Δ²); θ ← θ + η m / (√v + τ)",
        paper="Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, 2021, Adaptive Federated Optimization, "
        "arXiv 2003.00295",
        example={"clients": 4, "rounds": 2},
    )

    def second_moment(self, v: Tensor, Delta: Tensor) -> Tensor:
        return yogi_moment(v, Delta, self.beta2)
