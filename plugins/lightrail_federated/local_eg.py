"""Extragradient steps on clients, and averages of where they end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from lightrail import Traits
from lightrail.options import positive
from lightrail_federated.local_sgda import Field, LocalSGDA, descended

__all__ = ["LocalEG", "extragradient"]


def extragradient(x: Tensor, F_first: Field, F_second: Field, gamma_1: float, gamma_2: float) -> Tensor:
    r"""One step of the extragradient method, x - γ₂ F(x - γ₁ F(x)).

    Args:
        x: ``[d]``.
        F_first: The field with which it looks ahead.
        F_second: The field with which it steps: the same, or one of another batch.
        gamma_1: γ₁, positive.
        gamma_2: γ₂, positive.

    Example:
        >>> import torch
        >>> F = lambda z: torch.stack([z[1], -z[0]])
        >>> extragradient(torch.tensor([1.0, 1.0]), F, F, 0.5, 0.5)
        tensor([0.2500, 1.2500])
    """
    return x - gamma_2 * F_second(descended(x, F_first, gamma_1))


class LocalEG(LocalSGDA):
    """Local extragradient: clients look ahead along their own fields before they step, the server takes the mean.

    Each client makes K steps from the server's x,

    x_k ← x_k - γ₂ F_k(x_k - γ₁ F_k(x_k)),   then   x ← Σ_k (n_k/n) x_k,

    each of the two fields of a batch of its own. It converges on games on which descent-ascent turns in circles; where
    data differ it ends away from the equilibrium as that does.

    Args:
        lr: γ₂; positive.
        lookahead_lr: γ₁; as ``lr`` where nothing is said.
        full_gradients: Whether each field is of all samples of the client, in place of a batch.

    Example:
        >>> from lightrail import compose
        >>> run = ["+federated=local_eg", "federated.clients=4", "federated.lr=0.05", "logger=[]"]
        >>> compose(run).composition.config.federated.lr
        0.05

    Reference:
        S. Zhang, S. Choudhury, S. U. Stich and N. Loizou, Communication-Efficient Gradient Descent-Accent Methods for
        Distributed Variational Inequalities, ICLR 2024, where it is compared with. arXiv 2306.05100.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_k ← x_k - γ₂ F_k(x_k - γ₁ F_k(x_k)), K times; x ← Σ_k (n_k/n) x_k",
        paper="Zhang et al. 2024, Communication-Efficient Gradient Descent-Accent Methods, arXiv 2306.05100",
        example={"clients": 4, "rounds": 2, "lr": 0.05},
    )

    def __init__(self, *, lr: float = 0.1, lookahead_lr: float | None = None, **common: Any) -> None:
        super().__init__(lr=lr, **common)
        self.lookahead_lr = lr if lookahead_lr is None else lookahead_lr
        positive(lookahead_lr=self.lookahead_lr)

    def stepped(self, x: Tensor, fields: Iterator[Field]) -> Tensor:
        return extragradient(x, next(fields), next(fields), self.lookahead_lr, self.lr)
