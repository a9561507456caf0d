"""Text: the contract of token samplers, and the loop that writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightrail.generation.noise import Noise
from lightrail.traits import Traits

__all__ = ["TextModel", "TokenSampler", "write_text"]


@runtime_checkable
class TextModel(Protocol):
    """What a task offers whose model writes text."""

    def next_logits(self, tokens: Tensor) -> Tensor:
        """The logits ``[B, V]`` of the token after ``tokens`` ``[B, T]``, of which it looks at as many as it can."""
        ...

    def encode_text(self, text: str) -> Tensor:
        """The tokens ``[T]`` of a text; an empty text gives what a model starts from."""
        ...

    def decode_text(self, tokens: Tensor) -> str:
        """The text of tokens ``[T]``, as far as they make characters."""
        ...


class TokenSampler(ABC):
    """Chooses the next token.

    Subclasses write :meth:`probabilities`; the draw is made elsewhere, from random numbers that belong to the sample
    and the position, so that a text is the same in any batch.
    """

    traits: ClassVar[Traits] = Traits()

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """From what the model says to what is drawn from.

        Args:
            logits: ``[B, V]`` float64.

        Returns:
            At least 0, ``[B, V]``; they need not sum to 1.
        """


@torch.no_grad()
def write_text(
    model: TextModel,
    sampler: TokenSampler,
    prompt: Tensor,
    length: int,
    indices: Sequence[int],
    *,
    seed: int = 0,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues a prompt.

    Args:
        model: What says which tokens may follow.
        sampler: Which of them is taken.
        prompt: Tokens ``[T]``, at least one.
        length: How many to add.
        indices: Which texts, one whole number from 0 each.
        seed: Of the whole generation.
        on_token: Sees each new token ``[B]``.

    Returns:
        The tokens that were added, ``[B, length]``.
    """
    noise = Noise(seed, indices, (), torch.float64)
    tokens = prompt.expand(len(noise), -1)
    for position in range(length):
        logits = model.next_logits(tokens).double()
        probabilities = sampler.probabilities(logits)
        token = _drawn(probabilities, noise.uniform(position).to(probabilities.device))
        tokens = torch.cat((tokens, token[:, None].to(tokens.device)), dim=1)
        if on_token is not None:
            on_token(token)
    return tokens[:, prompt.shape[-1] :]


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token up to which more than a share ``uniform`` of the probability lies, ``[B]``."""
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding can leave the draw behind the last token that has any probability.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)
