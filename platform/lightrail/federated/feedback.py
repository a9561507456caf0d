"""Error feedback: what a compressor left out is not lost, but said later."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from lightrail.federated.compressor import Encoded

__all__ = ["ef21", "error_feedback"]

Message = TypeVar("Message", Tensor, Encoded)


def error_feedback(x: Tensor, e: Tensor, compress: Callable[[Tensor], Message]) -> tuple[Message, Tensor]:
    r"""Sends a vector with what was left out so far, and keeps what is left out now.

    .. math:: m = C(x + e), \qquad e^+ = x + e - m

    so that Σ m + e = Σ x at all times, whatever C leaves out.

    Args:
        x: ``[d]``.
        e: ``[d]``, zeros at first.
        compress: C, whose result is what it sends: an :class:`~lightrail.federated.compressor.Encoded`, or the tensor
            itself where no bytes are counted.

    Returns:
        m, as ``compress`` gave it, and e⁺.

    Example:
        >>> import torch
        >>> first = lambda v: v * torch.tensor([1.0, 0.0])
        >>> m, e = error_feedback(torch.tensor([1.0, 2.0]), torch.zeros(2), first)
        >>> m, e
        (tensor([1., 0.]), tensor([0., 2.]))

    Reference:
        F. Seide, H. Fu, J. Droppo, G. Li and D. Yu (2014), 1-Bit Stochastic Gradient Descent, Interspeech; as written
        in S. P. Karimireddy, Q. Rebjock, S. U. Stich and M. Jaggi (2019), Error Feedback Fixes SignSGD and other
        Gradient Compression Schemes, ICML, arXiv 1901.09847, algorithm 2.
    """
    message = compress(x + e)
    return message, x + e - _vector(message)


def ef21(x: Tensor, g: Tensor, compress: Callable[[Tensor], Message]) -> tuple[Message, Tensor]:
    r"""Sends how a vector differs from what the receiver has, and moves both of their copies by it.

    .. math:: m = C(x - g), \qquad g^+ = g + m

    Args:
        x: ``[d]``.
        g: ``[d]``, what the receiver has; zeros at first, unless x was once sent in full.
        compress: C, contractive; its result is as in :func:`error_feedback`.

    Returns:
        m, as ``compress`` gave it, and g⁺, which the receiver makes of m too.

    Example:
        >>> import torch
        >>> ef21(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), lambda v: v / 2)
        (tensor([0.2500, 1.0000]), tensor([0.7500, 1.0000]))

    Reference:
        P. Richtárik, I. Sokolov and I. Fatkhullin (2021), EF21: A New, Simpler, Theoretically Better, and Practically
        Faster Error Feedback, NeurIPS, arXiv 2106.05203, algorithm 2.
    """
    message = compress(x - g)
    return message, g + _vector(message)


def _vector(message: Tensor | Encoded) -> Tensor:
    return message.decoded() if isinstance(message, Encoded) else message
