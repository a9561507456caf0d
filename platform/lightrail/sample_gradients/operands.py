"""Where the samples of a batch lie in a tensor, and torch's Python functions made transparent."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError

__all__ = [
    "DROPOUT_OF_RECURRENT",
    "RECURRENT",
    "Axis",
    "Call",
    "cannot_separate",
    "samples_first",
    "transparent",
]


@dataclass(frozen=True)
class Axis:
    """The axis along which samples lie, each in ``rows`` places.

    A batch ``[B, T, d]`` that was flattened to ``[B T, d]`` has axis 0 with T rows a sample.

    Args:
        axis: The axis.
        rows: Places a sample.
        is_interleaved: Whether the first places of all samples come before the second of any, as they do where it was
            ``[T, B, d]`` that was flattened.
    """

    axis: int
    rows: int
    is_interleaved: bool = False


@dataclass(frozen=True)
class Call:
    """One operation that consumes a parameter, or something that was made of parameters alone.

    Args:
        func: The operation.
        operands: Where samples lie in each of its tensors, in order; ``None`` where they do not.
        outputs: The same of what it returns.
    """

    func: Any
    operands: tuple[Axis | None, ...]
    outputs: tuple[Axis | None, ...]

    @property
    def has_choice(self) -> bool:
        """Whether shapes alone do not say how samples lie."""
        return any(axis is not None and axis.rows > 1 for axis in (*self.operands, *self.outputs))

    def interleaved(self) -> Call:
        """The same operation with samples lying the other way."""

        def other(axis: Axis | None) -> Axis | None:
            return axis if axis is None or axis.rows == 1 else replace(axis, is_interleaved=not axis.is_interleaved)

        return Call(self.func, tuple(map(other, self.operands)), tuple(map(other, self.outputs)))

    @property
    def is_of_parameters(self) -> bool:
        """Whether no sample takes part: what comes out is a parameter in another form."""
        return not any(self.operands) and not any(self.outputs)


def samples_first(tensor: Tensor, axis: Axis) -> Tensor:
    """``[B, rows, …]``: the samples in front, then the places of each."""
    moved = tensor.movedim(axis.axis, 0)
    if axis.is_interleaved:
        return moved.reshape(axis.rows, -1, *moved.shape[1:]).movedim(1, 0)
    return moved.reshape(-1, axis.rows, *moved.shape[1:])


def cannot_separate(found: str) -> CompositionError:
    """The error of a model whose samples' gradients cannot be told apart in one backward pass."""
    return CompositionError(
        "the gradients of the samples cannot be told apart in one backward pass",
        found=found,
        allowed="a loss that is the mean of the losses of its samples, each of which depends on one sample alone",
        remedy="Evaluate samples one by one with privacy.engine=one_by_one (slow), or change that layer.",
    )


RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
DROPOUT_OF_RECURRENT = 5  # where the rate of the dropout between their layers stands among their arguments

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@cache
def transparent(func: Any) -> Callable[..., Any] | None:
    """A function of torch that is written in Python, such that the operations inside it are seen.

    ``F.multi_head_attention_forward`` and its like hand themselves over whole to whoever watches; their copy does not
    ask, so that the operations inside are handed over one by one.

    Returns:
        The copy; ``None`` for an operation that has nothing inside.
    """
    if not isinstance(func, types.FunctionType) or func.__closure__ or not set(_CHECKS) & set(func.__code__.co_names):
        return None
    names = {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
