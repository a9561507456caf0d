"""A batch with other inputs, and what a model says of it: for methods that perturb or transform what a model sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightrail.errors import ClosureError
from lightrail.step import Closure
from lightrail.step.randomness import RandomState

__all__ = ["generator_of_rank", "inputs_of", "outputs_with_one_mask"]


def inputs_of(method: str, *batches: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The inputs of a micro-batch, which are its first floating-point tensor with a sample axis.

    Args:
        method: The transform's name, for errors.
        batches: The micro-batch; nothing, where the closure was given none.

    Returns:
        The inputs, and what puts others in their place: the rest of the batch stays as it is.

    Raises:
        ClosureError: There is no such tensor, as for tokens.

    Example:
        >>> x, with_inputs = inputs_of("vat", (torch.zeros(2), torch.tensor([1, 0])))
        >>> with_inputs(x + 1)
        (tensor([1., 1.]), tensor([1, 0]))
    """
    leaves, structure = pytree.tree_flatten(batches[0] if batches else None)
    is_input = [isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0 for leaf in leaves]
    if True not in is_input:
        tensors = [f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves if isinstance(leaf, Tensor)]
        raise ClosureError(
            f"{method} changes the inputs of a batch, and this one has none that can be changed by a little",
            found=", ".join(tensors) or "no batch with tensors",
            allowed="a batch whose first floating-point tensor is the inputs, samples along the leading axis",
            remedy="Choose data with real-valued inputs (tokens have none), and pass the batch to lightrail.Closure.",
        )
    where = is_input.index(True)

    def with_inputs(x: Tensor) -> Any:
        return pytree.tree_unflatten([*leaves[:where], x, *leaves[where + 1 :]], structure)

    return leaves[where], with_inputs


def outputs_with_one_mask(closure: Closure) -> Callable[[Any], Tensor]:
    """``closure.outputs`` with the same dropout masks at every call, so that two answers differ by the inputs alone.

    Make it inside the function that is given to ``gradient_of``: the masks are those of the window.
    """
    state = RandomState.capture()

    def outputs(batch: Any) -> Tensor:
        state.restore()
        return closure.outputs(batch)

    return outputs


def generator_of_rank(device: torch.device) -> torch.Generator:
    """A generator made from one number of torch's global one; ranks, whose samples differ, draw different numbers."""
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return torch.Generator(device).manual_seed(seed + rank)
