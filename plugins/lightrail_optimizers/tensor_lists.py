"""The parameters of a group as lists that one update can take at once, and norms over such lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightrail.errors import ConfigurationError
from lightrail.step.sharded import whole_of

__all__ = [
    "add_scaled_",
    "count_step",
    "gather",
    "global_norm",
    "refuse_complex",
    "refuse_sharded",
    "refuse_sparse",
    "shrink_",
]

# On a CPU an update is a chain of passes over memory. Lists of about this many elements (256 KiB in single precision)
# stay in a core's cache from the first pass to the last; an accelerator wants one list, however long.
_CACHED_ELEMENTS = 1 << 16


def refuse_complex(method: str, params: Sequence[Tensor]) -> None:
    """Raises where a parameter is complex."""
    for p in params:
        if p.is_complex():
            raise ConfigurationError(
                f"{method} does not take complex parameters",
                found=f"a parameter of {p.dtype} and shape {tuple(p.shape)}",
                allowed="real floating-point parameters",
                remedy="Keep it as two real parameters (torch.view_as_real), or choose torch's AdamW.",
            )


def refuse_sparse(method: str, gradient: Tensor) -> None:
    """Raises, naming the method: what the caller found is a sparse gradient."""
    raise ConfigurationError(
        f"{method} does not take sparse gradients",
        found=f"a gradient of layout {gradient.layout} and shape {tuple(gradient.shape)}",
        allowed="dense gradients",
        remedy="Make the embedding with sparse=False, or choose torch.optim.SparseAdam.",
    )


def refuse_sharded(method: str, params: Sequence[Tensor]) -> None:
    """Raises where a parameter is cut over several devices, for a method that works on whole tensors."""
    for p in params:
        if isinstance(p, DTensor) and any(placement.is_shard() for placement in p.placements):
            raise ConfigurationError(
                f"{method} works on whole tensors, which sharding cuts",
                found=f"a parameter of shape {tuple(p.shape)}, placed {p.placements}",
                allowed="parameters that are whole on every device",
                remedy="Use distributed data parallelism in place of sharding, or an elementwise method.",
            )


def shrink_(x: list[Tensor], by: float | Tensor) -> None:
    """``x *= 1 - by``, in place: decoupled weight decay."""
    # Not `_foreach_mul_(x, 1 - by)`: on a CPU it rounds the factor to half precision when x is in it.
    if isinstance(by, Tensor):
        torch._foreach_sub_(x, torch._foreach_mul(x, by))
    elif by:
        torch._foreach_add_(x, x, alpha=-by)


def add_scaled_(x: list[Tensor], u: list[Tensor], by: float | Tensor) -> None:
    """``x += by u``, in place; a 0-d tensor for ``by`` keeps a compiled update valid when it changes."""
    if isinstance(by, Tensor):
        torch._foreach_add_(x, torch._foreach_mul(u, by))
    else:
        torch._foreach_add_(x, u, alpha=by)


def count_step(kept: dict[str, Any]) -> int:
    """Counts an update of a parameter in its state, from 1, for rules whose scalars depend on the step."""
    kept["step"] = kept.get("step", 0) + 1
    return kept["step"]


def gather(
    method: str,
    group: Mapping[str, Any],
    state: MutableMapping[Tensor, Any],
    keys: Sequence[str],
    count: Callable[[dict[str, Any]], int] | None = None,
    cached: bool = True,
) -> Iterator[tuple[list[Tensor], ...]]:
    """The parameters of a group that have a gradient, their gradients and their states.

    A list holds tensors of one device and one dtype. State that is not there yet is zeros in the parameter's dtype.

    Args:
        method: The optimizer's name, for errors.
        group: One of the optimizer's ``param_groups``.
        state: The optimizer's ``state``.
        keys: The names under which it keeps its tensors.
        count: Called once a parameter with its state; parameters for which it differs are in different lists.
        cached: Whether lists on a CPU are short enough for its cache.

    Yields:
        ``(params, gradients, *states)``, lists of equal length; a parameter appears in one of them.
    """
    open_lists: dict[tuple[torch.device, torch.dtype, int], tuple[list[Tensor], ...]] = {}
    sizes: dict[tuple[torch.device, torch.dtype, int], int] = {}
    for p in group["params"]:
        gradient = p.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            refuse_sparse(method, gradient)
        kept = state[p]
        if not kept:
            for key in keys:
                kept[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        where = (p.device, p.dtype, count(kept) if count else 0)
        lists = open_lists.get(where)
        size = p.numel()
        if lists is not None and cached and where[0].type == "cpu" and sizes[where] + size > _CACHED_ELEMENTS:
            yield lists
            lists = None
        if lists is None:
            lists = open_lists[where] = tuple([] for _ in range(2 + len(keys)))
            sizes[where] = 0
        sizes[where] += size
        lists[0].append(p)
        lists[1].append(gradient)
        for held, key in zip(lists[2:], keys, strict=True):
            held.append(kept[key])
    yield from open_lists.values()


def _largest(t: Tensor) -> Tensor:
    """The largest magnitude; one vectorised pass, where torch's norm takes twenty times as long on a CPU."""
    if t.is_complex():
        return t.abs().max()
    least, most = torch.aminmax(t)
    return torch.maximum(-least, most)


def global_norm(tensors: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all entries of all tensors as one vector, in single precision at least.

    Args:
        tensors: Any shapes and devices; empty ones count for nothing.
        norm_type: The p of the p-norm, > 0; ``math.inf`` for the largest magnitude.

    Returns:
        A 0-d tensor on the device of the first; 0 where there is nothing.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor(4.0)]).item()
        5.0
    """
    filled = [t.detach() for t in tensors if t.numel() > 0]
    if not filled:
        return torch.zeros(())
    first = filled[0].device
    if math.isinf(norm_type):
        norms = [_largest(t) for t in filled]
    else:
        wide = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in filled]
        norms = torch._foreach_norm(wide, norm_type)
    return torch.linalg.vector_norm(
        torch.stack([whole_of(n).to(first, torch.promote_types(n.dtype, torch.float32)) for n in norms]), norm_type
    )
