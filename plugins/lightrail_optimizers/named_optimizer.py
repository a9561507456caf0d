"""Bases of optimizers that know their parameters by name, and of those that move them block by block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightrail.options import at_least
from lightrail_optimizers.named_parameters import named_groups
from lightrail_optimizers.tensor_lists import refuse_sparse
from lightrail_optimizers.tensorwise import MethodOptimizer

__all__ = ["BlockOptimizer", "NamedOptimizer", "layer_blocks"]


def layer_blocks(named: Sequence[tuple[str, Tensor]], count: int | None = None) -> list[list[Tensor]]:
    """Parameters by layer: those whose names agree up to the last dot.

    Args:
        named: ``(name, parameter)`` pairs.
        count: Joins consecutive layers into that many blocks, of nearly equally many layers each; ``None`` or more
            than there are layers for a block a layer.

    Returns:
        Blocks in the order in which their first parameter appears.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> [[tuple(p.shape) for p in block] for block in layer_blocks(list(model.named_parameters()))]
        [[(2, 3), (2,)], [(1, 2), (1,)]]
    """
    layers: dict[str, list[Tensor]] = {}
    for name, p in named:
        layers.setdefault(name.rpartition(".")[0], []).append(p)
    ordered = list(layers.values())
    count = len(ordered) if count is None else min(count, len(ordered))
    bounds = [i * len(ordered) // count for i in range(count + 1)] if count else []
    return [[p for layer in ordered[start:end] for p in layer] for start, end in itertools.pairwise(bounds)]


class NamedOptimizer(MethodOptimizer):
    """An optimizer built from ``(name, parameter)`` pairs; its groups keep the names under ``param_names``."""

    # Attributes that belong to the optimizer rather than to a group: a checkpoint does not bring them, a copy does.
    _own: ClassVar[tuple[str, ...]] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        (group,) = named_groups(type(self).__name__, [param_group])
        names, params = [name for name, _ in group["params"]], [p for _, p in group["params"]]
        # Written here, since torch leaves names out of a group without parameters, and then refuses the mixture.
        super().add_param_group({**group, "params": params, "param_names": names})

    def named(self) -> list[tuple[str, Tensor]]:
        """All parameters with their names, in the order of the groups."""
        return [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]


class BlockOptimizer(NamedOptimizer):
    """An optimizer that moves one block of its parameters at a time.

    Args:
        params: ``(name, parameter)`` pairs, or groups of them.
        defaults: Options of a group.
        blocks: As ``count`` of :func:`layer_blocks`. A block may reach over several groups.
    """

    _own = ("_count", "blocks")

    def __init__(self, params: Any, defaults: dict[str, Any], blocks: int | None) -> None:
        if blocks is not None:
            at_least(1, blocks=blocks)
        self._count = blocks
        self.blocks: list[list[Tensor]] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.blocks = layer_blocks(self.named(), self._count)

    def moving_blocks(self) -> list[list[Tensor]]:
        """The blocks, without the parameters that have no gradient; some may be empty."""
        found = [[p for p in block if p.grad is not None] for block in self.blocks]
        for p in (p for block in found for p in block):
            if p.grad is not None and p.grad.is_sparse:
                refuse_sparse(type(self).__name__, p.grad)
        return found
