"""Federated averaging with a server that steps as Adagrad does."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightrail import Traits
from lightrail_federated.adaptive_server import AdaptiveServer, adagrad_moment

__all__ = ["FedAdagrad"]


class FedAdagrad(AdaptiveServer):
    r"""FedAvg with the mean update Δ in the place of Adagrad's negative gradient.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) \Delta, \qquad v \leftarrow v + \Delta^2

    .. math:: \theta \leftarrow \theta + \eta \frac{m}{\sqrt{v} + \tau}, \qquad
              \Delta = \sum_{k \in S} \frac{n_k}{n_S} (y_k - \theta)

    with m = 0 and v = τ² at first.

    Args:
        lr: η, of the server, greater than 0.
        beta1: β₁, in [0, 1); 0, without momentum, is what the paper measures.
        tau: τ, greater than 0: how much of the step is adaptive.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=fedadagrad", "federated.lr=0.3", "federated.clients=4", "logger=[]"]
        >>> compose(run).composition.config.federated.lr
        0.3

    Reference:
        S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar and H. B. McMahan (2021), Adaptive
        Federated Optimization, ICLR, arXiv 2003.00295, algorithm 2.
    """

    traits: ClassVar[Traits] = Traits(
        rule="v ← v + Δ²; θ ← θ + η m / (√v + τ)",
        paper="Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, 2021, Adaptive Federated Optimization, "
        "arXiv 2003.00295",
        example={"clients": 4, "rounds": 2},
    )

    def __init__(self, *, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3, **common: Any) -> None:
        super().__init__(lr=lr, beta1=beta1, tau=tau, **common)

    def second_moment(self, v: Tensor, Delta: Tensor) -> Tensor:
        return adagrad_moment(v, Delta)
