"""Addition modulo a prime, which a network fits long before it understands it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from lightrail.bench.claims.problem import CountedClosure, Problem
from lightrail.traits import Traits

__all__ = ["ModularAddition"]

_MODULUS = 47


class ModularAddition(Problem):
    """``a + b mod 47`` from half of all pairs, by two hidden layers of 200 on one-hot inputs, all pairs at once.

    The merit is the share of the other pairs that are answered wrongly.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> 0.9 < ModularAddition().merit() <= 1
        True
    """

    traits = Traits(rule="softmax cross entropy of a + b mod 47, 1104 of 2209 pairs, ReLU layers of 200 and 200")
    passes = 600
    merit_name = "test error"

    def __init__(self) -> None:
        pairs = torch.cartesian_prod(torch.arange(_MODULUS), torch.arange(_MODULUS))
        inputs = one_hot(pairs, _MODULUS).flatten(1).float()
        answers = pairs.sum(1) % _MODULUS
        trained, tested = torch.randperm(len(pairs)).tensor_split([len(pairs) // 2])
        self._trained, self._tested = ((inputs[rows], answers[rows]) for rows in (trained, tested))
        self._model = nn.Sequential(
            nn.Linear(2 * _MODULUS, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, _MODULUS)
        )

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self._model.named_parameters())

    def closure(self, step: int) -> CountedClosure:
        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return cross_entropy(self._model(batch[0]), batch[1])

        def sampled_loss(batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
            logits = self._model(batch[0])
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            return cross_entropy(logits, drawn)

        params = [p for _, p in self.named_parameters()]
        return CountedClosure(loss, params, self._trained, module=self._model, sampled_loss_fn=sampled_loss)

    @torch.no_grad()
    def merit(self) -> float:
        inputs, answers = self._tested
        return float(self._model(inputs).argmax(1).ne(answers).double().mean())
