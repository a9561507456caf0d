"""Along which axes samples lie: learned by evaluating a few samples twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightrail.sample_gradients.operands import Axis, Call, cannot_separate, transparent
from lightrail.step.batches import leading_size

__all__ = ["PROBED", "Path", "survey", "take"]

PROBED = (3, 2)  # samples in the two evaluations; an axis along which samples lie has grown in this proportion

Path = tuple[Call, ...]
"""The operations with parameters that an evaluation goes through, in order."""


def take(batch: Any, rows: Sequence[int]) -> Any:
    """Some samples of a batch, in its own structure; what has no sample axis stays.

    Example:
        >>> take({"x": torch.arange(4), "name": "a"}, [2, 0])
        {'x': tensor([2, 0]), 'name': 'a'}
    """
    size = leading_size(batch)
    index = list(rows)

    def of(leaf: Any) -> Any:
        is_split = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return leaf[index] if is_split else leaf

    return pytree.tree_map(of, batch)


def survey(evaluate: Callable[[Any], Any], params: Sequence[Tensor], batch: Any) -> Path:
    """Evaluates three samples, then two, and compares the shapes of all operands.

    An axis that went from three (or a multiple) to two is the axis of the samples, wherever it lies; a tensor none of
    whose axes moved holds no samples, even where one of its sizes happens to be that of the batch.

    Args:
        evaluate: The loss of a batch.
        params: The parameters.
        batch: At least one sample.

    Returns:
        The operations with parameters, in order, with the axes of their operands.

    Raises:
        CompositionError: The model does something else with another number of samples, or mixes them.
    """
    size = leading_size(batch) or 1
    first = _Survey(params)
    with torch.enable_grad(), first:
        evaluate(take(batch, [i % size for i in range(PROBED[0])]))
    second = _Survey(params, first.seen)
    with torch.enable_grad(), second:
        evaluate(take(batch, [i % size for i in range(PROBED[1])]))
    return tuple(second.calls)


@dataclass(frozen=True)
class _Seen:
    func: Any
    operands: list[torch.Size]
    outputs: list[torch.Size]


class _Survey(TorchFunctionMode):
    """Notes down every operation; the second time, compares with the first."""

    def __init__(self, params: Sequence[Tensor], before: list[_Seen] | None = None) -> None:
        super().__init__()
        self.seen: list[_Seen] = []
        self.calls: list[Call] = []
        self._before = before
        self._params = {id(p): p for p in params}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = transparent(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        shapes = [each.shape for each in operands]
        found = func(*args, **kwargs)
        outputs = tensors_in(found)
        # What has no gradient never consumed a parameter that counts; how often it is done may change.
        if torch.is_grad_enabled() and any(each.requires_grad for each in outputs):
            self.seen.append(_Seen(func, shapes, [each.shape for each in outputs]))
            if self._before is not None and any(id(each) in self._params for each in operands):
                self._compare(outputs)
        return found

    def _compare(self, outputs: list[Tensor]) -> None:
        if not makes_something(outputs, self._params):
            return
        now = self.seen[-1]
        index = len(self.seen) - 1
        before = self._before[index] if self._before is not None and index < len(self._before) else None
        if before is None or before.func != now.func or len(before.operands) != len(now.operands):
            raise cannot_separate(f"the model does something else with {PROBED[1]} samples than with {PROBED[0]}")
        call = Call(
            now.func,
            tuple(map(_axis, before.operands, now.operands)),
            tuple(map(_axis, before.outputs, now.outputs)),
        )
        self.calls.append(call)
        if call.is_of_parameters:
            self._params.update({id(each): each for each in outputs if each.requires_grad})


def _axis(three: torch.Size, two: torch.Size) -> Axis | None:
    if len(three) != len(two):
        raise cannot_separate(f"a tensor of shape {tuple(three)} with three samples and {tuple(two)} with two")
    moved = [axis for axis, (more, less) in enumerate(zip(three, two, strict=True)) if more != less]
    if not moved:
        return None
    axis = moved[0]
    rows, rest = divmod(two[axis], PROBED[1])
    if len(moved) > 1 or rest or rows * PROBED[0] != three[axis]:
        raise cannot_separate(
            f"an operand of shape {tuple(three)} with three samples and {tuple(two)} with two: "
            "its samples cannot be laid out one after the other"
        )
    return Axis(axis, rows)


def consumes(params: dict[int, Tensor], args: Any, kwargs: Any) -> bool:
    """Whether one of the operands is among ``params``; called at every operation, so it looks one level deep."""
    for each in args:
        if id(each) in params or (type(each) in (list, tuple) and any(id(inner) in params for inner in each)):
            return True
    return any(id(each) in params for each in kwargs.values())


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def makes_something(outputs: Sequence[Tensor], params: dict[int, Tensor]) -> bool:
    """Whether an operation on parameters gives something new to differentiate: not a size, a copy without gradient."""
    return any(each.requires_grad and id(each) not in params for each in outputs)
