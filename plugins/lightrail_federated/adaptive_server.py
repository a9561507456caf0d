"""Servers whose step has a memory: momentum, and the adaptive methods of deep learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.federated import Heard, State
from lightrail.options import between, positive
from lightrail_federated.fedavg import FedAvg

__all__ = [
    "AdaptiveServer",
    "DecayingServer",
    "adagrad_moment",
    "adam_moment",
    "adaptive_step",
    "momentum_step",
    "yogi_moment",
]


def momentum_step(theta: Tensor, m: Tensor, Delta: Tensor, eta: float, beta: float) -> tuple[Tensor, Tensor]:
    r"""A step along the decaying sum of the updates.

    .. math:: m^+ = \beta m + \Delta, \qquad \theta^+ = \theta + \eta m^+

    Args:
        theta: θ ``[d]``.
        m: ``[d]``, zeros at first.
        Delta: Δ, the mean of the clients' updates ``[d]``.
        eta: η, greater than 0.
        beta: β, in [0, 1).

    Returns:
        θ⁺ and m⁺.

    Example:
        >>> one = torch.ones(1)
        >>> momentum_step(one, 2 * one, one, eta=0.5, beta=0.5)
        (tensor([2.]), tensor([2.]))
    """
    m = beta * m + Delta
    return theta + eta * m, m


def adagrad_moment(v: Tensor, Delta: Tensor) -> Tensor:
    """v + Δ².

    Args:
        v: ``[d]``, at least 0.
        Delta: Δ ``[d]``.

    Example:
        >>> adagrad_moment(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([5.])
    """
    return v + Delta.square()


def adam_moment(v: Tensor, Delta: Tensor, beta2: float) -> Tensor:
    """β₂ v + (1 - β₂) Δ².

    Args:
        v: ``[d]``, at least 0.
        Delta: Δ ``[d]``.
        beta2: β₂, in [0, 1).

    Example:
        >>> adam_moment(torch.tensor([1.0]), torch.tensor([3.0]), 0.75)
        tensor([3.])
    """
    return beta2 * v + (1 - beta2) * Delta.square()


def yogi_moment(v: Tensor, Delta: Tensor, beta2: float) -> Tensor:
    """v - (1 - β₂) Δ² sign(v - Δ²): as Adam's where both are near, and slower to forget a large one.

    Args:
        v: ``[d]``, at least 0.
        Delta: Δ ``[d]``.
        beta2: β₂, in [0, 1).

    Example:
        >>> yogi_moment(torch.tensor([1.0, 16.0]), torch.tensor([3.0, 2.0]), 0.75)
        tensor([ 3.2500, 15.0000])
    """
    square = Delta.square()
    return v - (1 - beta2) * square * torch.sign(v - square)


def adaptive_step(theta: Tensor, m: Tensor, v: Tensor, eta: float, tau: float) -> Tensor:
    r"""The step that the second moment divides.

    .. math:: \theta^+ = \theta + \eta \frac{m}{\sqrt{v} + \tau}

    Args:
        theta: θ ``[d]``.
        m: The mean of the updates ``[d]``.
        v: The mean of their squares ``[d]``, at least 0.
        eta: η, greater than 0.
        tau: τ, greater than 0: how much of it is adaptive; with a large one it is a step of η/τ.

    Returns:
        θ⁺.

    Example:
        >>> adaptive_step(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([9.0]), eta=0.5, tau=1.0)
        tensor([1.2500])
    """
    return theta + eta * m / (v.sqrt() + tau)


class AdaptiveServer(FedAvg):
    """FedAvg whose server divides its step by the history of the updates; a method says what that history is.

    m ← β₁ m + (1 - β₁) Δ,   θ ← θ + η m / (√v + τ),   with m = 0 and v = τ² at first.

    Args:
        lr: η, of the server, greater than 0.
        beta1: β₁, in [0, 1).
        tau: τ, greater than 0.
    """

    def __init__(self, *, lr: float = 0.1, beta1: float = 0.9, tau: float = 1e-3, **common: Any) -> None:
        super().__init__(**common)
        positive(lr=lr, tau=tau)
        between(0.0, 1.0, beta1=beta1)
        self.lr, self.beta1, self.tau = lr, beta1, tau

    def start(self, weights: Tensor) -> State:
        return {"weights": weights, "m": torch.zeros_like(weights), "v": torch.full_like(weights, self.tau**2)}

    def second_moment(self, v: Tensor, Delta: Tensor) -> Tensor:
        """The history of the squares after one more update."""
        raise NotImplementedError

    def server(self, server: State, mean: State, heard: Heard) -> State:
        if not mean:
            return server
        Delta = mean["update"]
        m = self.beta1 * server["m"] + (1 - self.beta1) * Delta
        v = self.second_moment(server["v"], Delta)
        return {"weights": adaptive_step(server["weights"], m, v, self.lr, self.tau), "m": m, "v": v}


class DecayingServer(AdaptiveServer):
    """An adaptive server whose history of squares is forgotten at a rate of its own.

    Args:
        lr: η, of the server, greater than 0.
        beta1: β₁, in [0, 1).
        beta2: β₂ of the squares, in [0, 1).
        tau: τ, greater than 0.
    """

    def __init__(
        self, *, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, **common: Any
    ) -> None:
        super().__init__(lr=lr, beta1=beta1, tau=tau, **common)
        between(0.0, 1.0, beta2=beta2)
        self.beta2 = beta2
