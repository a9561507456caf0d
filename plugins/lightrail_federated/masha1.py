"""MASHA with unbiased compression."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightrail import Traits
from lightrail.federated import Encoded, State
from lightrail_federated.masha import Masha

__all__ = ["MASHA1"]


class MASHA1(Masha):
    r"""MASHA1: extragradient for games and variational inequalities, with unbiased compression in both directions.

    With F = Σ_k (n_k/n) F_k each player's gradient of its own loss (of one loss, the gradient), and a reference point
    w whose F(w) all clients know:

    z_½ = τz + (1 - τ)w - γF(w)
    clients send Q(F_k(z_½) - F_k(w)); the server sends g = Q(mean)
    z⁺ = z_½ - γg
    w⁺ = z⁺ with probability 1 - τ, else w

    A new reference point costs a round of its own, in which whole fields are sent; so a round is one communication.
    Without a compressor, or with one that changes nothing, τ is 0 and this is the extragradient method in two rounds a
    step.

    Args:
        lr: γ; positive; theory has γ ≤ √(1-τ)/(2 C_q L), practice about 0.3/L, with L the Lipschitz constant of F.
        tau: τ, in [0, 1); 1 - τ is the share that the compressor keeps, 1/(1 + ω), where nothing is said.
        full_gradients: Whether a difference of fields is of all samples of the client, in place of a batch, which is
            the same one at both points. The field of a new reference point is always of all.

    Deviations:
        There is no regulariser. The mean is weighted by samples. All clients have to be there in all rounds, since
        they follow the iterate from compressed steps; one that misses a round is left out from then on.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=masha1", "federated.clients=4", "federated.compressor=rand_k", "logger=[]"]
        >>> compose(run).composition.config.federated.clients
        4

    Reference:
        A. Beznosikov, P. Richtárik, M. Diskin, M. Ryabinin and A. Gasnikov, Distributed Methods with Compressed
        Communication for Solving Variational Inequalities, with Theoretical Guarantees, NeurIPS 2022, MASHA1.
        arXiv 2110.03313.
    """

    traits: ClassVar[Traits] = Traits(
        rule="z_½ = τz + (1-τ)w - γF(w); z ← z_½ - γ Q(mean Q(F_k(z_½) - F_k(w))); w ← z with probability 1-τ",
        paper="Beznosikov et al. 2022, Distributed Methods with Compressed Communication for Solving Variational "
        "Inequalities, arXiv 2110.03313",
        is_stochastic=True,
        example={"clients": 4, "rounds": 4, "lr": 0.05},
        verified=(
            "Without a compressor it is the extragradient method within 4e-16.",
            "Ten different strongly monotone games of 20 numbers, lr 0.3/L: with rand_k of 10 and of 5 numbers the "
            "squared relative error is below 1e-30 after 2000 steps, with 2 numbers after 4000.",
        ),
    )
    compressors: ClassVar[Literal["unbiased"]] = "unbiased"

    def difference_sent(self, difference: Tensor, state: State, generator: torch.Generator) -> Tensor | Encoded:
        return self.compressed(difference, generator)

    def mean_sent(self, mean: Tensor, state: State, generator: torch.Generator) -> Tensor | Encoded:
        return self.compressed(mean, generator)

    def stepped(self, half: Tensor, arrived: Tensor) -> Tensor:
        return half - self.lr * arrived
