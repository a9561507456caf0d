"""Samplers of tokens: which of the tokens that a language model proposes is taken."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightrail.generation.text import TokenSampler
from lightrail.options import at_least, between, positive
from lightrail.traits import Traits

__all__ = ["Greedy", "MinP", "Temperature", "TopK", "TopP"]


class Greedy(TokenSampler):
    """Takes the likeliest token; of equals the first.

    Example:
        >>> Greedy().probabilities(torch.tensor([[0.1, 2.0, 1.0]]))
        tensor([[0., 1., 0.]])
    """

    traits: ClassVar[Traits] = Traits(rule="argmax p")

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


class Temperature(TokenSampler):
    """Draws from p ∝ exp(logits/τ).

    Args:
        temperature: τ, above 0; below 1 sharper than the model, above 1 flatter, 1 the model itself.

    Raises:
        ConfigurationError: τ is not above 0; ``greedy`` is its limit.

    Example:
        >>> Temperature(0.5).probabilities(torch.tensor([[0.0, 1.0]]))
        tensor([[0.1192, 0.8808]])
    """

    traits: ClassVar[Traits] = Traits(rule="p ∝ exp(logits/τ)", is_stochastic=True)

    def __init__(self, temperature: float = 1.0) -> None:
        positive(temperature=temperature)
        self.temperature = temperature

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(-1)


class TopK(Temperature):
    """Draws from the k likeliest tokens; tokens as likely as the k-th all stay.

    Args:
        k: How many, at least 1.
        temperature: τ, above 0, applied first.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> TopK(k=1).probabilities(torch.tensor([[0.0, 1.0]]))
        tensor([[0.0000, 0.7311]])

    Reference:
        A. Fan, M. Lewis and Y. Dauphin (2018), Hierarchical Neural Story Generation, arXiv 1805.04833, section 5.4.
    """

    traits: ClassVar[Traits] = Traits(
        rule="p restricted to the k largest",
        paper="A. Fan, M. Lewis, Y. Dauphin, 2018, Hierarchical Neural Story Generation, arXiv 1805.04833",
        is_stochastic=True,
    )

    def __init__(self, k: int = 50, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        at_least(1, k=k)
        self.k = k

    def probabilities(self, logits: Tensor) -> Tensor:
        p = super().probabilities(logits)
        smallest = p.topk(min(self.k, p.shape[-1]), dim=-1).values[:, -1:]
        return p * (p >= smallest)


class TopP(Temperature):
    """Draws from the smallest set of likeliest tokens that together have probability p.

    Args:
        p: In (0, 1]; 1 keeps all.
        temperature: τ, above 0, applied first.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> TopP(p=0.5).probabilities(torch.tensor([[0.6, 0.3, 0.1]]).log())
        tensor([[0.6000, 0.0000, 0.0000]])

    Reference:
        A. Holtzman, J. Buys, L. Du, M. Forbes and Y. Choi (2020), The Curious Case of Neural Text Degeneration, arXiv
        1904.09751, section 3.1.
    """

    traits: ClassVar[Traits] = Traits(
        rule="p restricted to the smallest set of largest with Σ p ≥ p",
        paper="A. Holtzman, J. Buys, L. Du, M. Forbes, Y. Choi, 2020, The Curious Case of Neural Text Degeneration, "
        "arXiv 1904.09751",
        is_stochastic=True,
    )

    def __init__(self, p: float = 0.9, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        between(0, 1, closed="right", p=p)
        self.p = p

    def probabilities(self, logits: Tensor) -> Tensor:
        falling, order = super().probabilities(logits).sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it do not yet reach p, so the first always does.
        before = falling.cumsum(-1) - falling
        return torch.zeros_like(falling).scatter(-1, order, falling * (before < self.p))


class MinP(Temperature):
    """Draws from the tokens that are at least ``min_p`` times as likely as the likeliest.

    Args:
        min_p: In [0, 1]; 0 keeps all, 1 only the likeliest.
        temperature: τ, above 0, applied first.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> MinP(min_p=0.4).probabilities(torch.tensor([[0.6, 0.3, 0.1]]).log())
        tensor([[0.6000, 0.3000, 0.0000]])

    Reference:
        M. N. Nguyen, A. Baker, C. Neo, A. Roush, A. Kirsch and R. Shwartz-Ziv (2024), Turning Up the Heat: Min-p
        Sampling for Creative and Coherent LLM Outputs, arXiv 2407.01082, section 3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="p restricted to p ≥ min_p · max p",
        paper="M. N. Nguyen, A. Baker, C. Neo, A. Roush, A. Kirsch, R. Shwartz-Ziv, 2024, Turning Up the Heat: Min-p "
        "Sampling for Creative and Coherent LLM Outputs, arXiv 2407.01082",
        is_stochastic=True,
    )

    def __init__(self, min_p: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        between(0, 1, closed="both", min_p=min_p)
        self.min_p = min_p

    def probabilities(self, logits: Tensor) -> Tensor:
        p = super().probabilities(logits)
        return p * (p >= self.min_p * p.amax(-1, keepdim=True))
