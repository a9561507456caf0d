"""Dividing an optimizer's groups, so that some parameters have learning rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.errors import CompositionError

__all__ = ["divide_groups"]


def divide_groups(method: str, optimizer: Optimizer, factors: Mapping[Tensor, float]) -> None:
    """Multiplies learning rates, parameter by parameter; weight decay is divided, so that their product stays.

    Parameters of one group with one factor stay together, in their order.

    Args:
        method: Who asks, for the error.
        optimizer: One without state as yet.
        factors: One a parameter.

    Raises:
        CompositionError: The optimizer has one learning rate for all parameters.

    Example:
        >>> slow, fast = torch.zeros(1), torch.ones(1)
        >>> optimizer = torch.optim.SGD([slow, fast], lr=0.5, weight_decay=0.1)
        >>> divide_groups("mine", optimizer, {slow: 0.5, fast: 1.0})
        >>> [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [([tensor([0.])], 0.25, 0.2), ([tensor([1.])], 0.5, 0.1)]
    """
    if isinstance(optimizer, torch.optim.LBFGS) or any("lr" not in group for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise CompositionError(
            f"{method} gives parameters learning rates of their own, and {name} has one for all",
            found=f"{name}, whose parameters are one group"
            if isinstance(optimizer, torch.optim.LBFGS)
            else f"{name}, whose groups have no learning rate",
            allowed="an optimizer whose groups each have a learning rate",
            remedy="Choose another optimizer, as optimizer=adamw.",
        )
    divided = []
    for group in optimizer.param_groups:
        places: dict[float, list[int]] = {} if group["params"] else {1.0: []}
        for place, p in enumerate(group["params"]):
            places.setdefault(factors[p], []).append(place)
        divided += [_part(group, factor, chosen) for factor, chosen in places.items()]
    optimizer.param_groups[:] = divided


def _part(group: Mapping[str, Any], factor: float, places: list[int]) -> dict[str, Any]:
    part = {**group, "params": [group["params"][place] for place in places]}
    if "param_names" in group:
        part["param_names"] = [group["param_names"][place] for place in places]
    if factor != 1:
        part["lr"] = group["lr"] * factor
        if group.get("weight_decay"):
            part["weight_decay"] = group["weight_decay"] / factor
    return part
