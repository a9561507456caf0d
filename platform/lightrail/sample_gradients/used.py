"""One use of a parameter, as it was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.sample_gradients.operands import Axis, Call, cannot_separate

__all__ = ["Used"]


class Used:
    """The operands of one operation with parameters, and the gradients of what came out, as far as they have arrived.

    Args:
        call: The operation, with where samples lie.
        func: What computes it without writing into its operands.
        leaves: Its operands, flattened.
        structure: How they were nested.
        owners: Those that are parameters, or made of parameters, by their position among ``leaves``.
        found: What it returned.
    """

    def __init__(
        self, call: Call, func: Any, leaves: Sequence[Any], structure: Any, owners: dict[int, Tensor], found: Any
    ) -> None:
        self.call = call
        self.func = func
        self.leaves = list(leaves)
        self.structure = structure
        self.owners = owners
        self.gradients: dict[int, Tensor] = {}
        outputs = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        self.outputs: list[tuple[torch.Size, torch.dtype]] = [(each.shape, each.dtype) for each in outputs]
        self.expected = sum(each.is_floating_point() for each in outputs)
        places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.axes: dict[int, Axis | None] = dict(zip(places, call.operands, strict=True))
        self._versions = {i: self.leaves[i]._version for i in places}

    @property
    def name(self) -> str:
        return getattr(self.call.func, "__name__", str(self.call.func))

    def arguments(self, leaves: Sequence[Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        return pytree.tree_unflatten(list(self.leaves if leaves is None else leaves), self.structure)

    def owner_at(self, value: Any) -> Tensor | None:
        """The parameter that stands for a bare operand; ``None`` where it is none."""
        for index, owner in self.owners.items():
            if self.leaves[index] is value:
                return owner
        return None

    def axis_of(self, value: Any) -> Axis | None:
        """Where samples lie in an operand."""
        return next((axis for i, axis in self.axes.items() if self.leaves[i] is value), None)

    def check_untouched(self) -> None:
        """Refuses operands that were overwritten after they were used."""
        for index, version in self._versions.items():
            if index not in self.owners and self.leaves[index]._version != version:
                raise cannot_separate(f"what went into {self.name} was overwritten by a later operation in place")
