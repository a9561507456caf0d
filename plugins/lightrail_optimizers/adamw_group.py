"""AdamW for the parameters of one group: what methods do with the parameters that are none of theirs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lightrail_optimizers.adam_rule import adamw_
from lightrail_optimizers.tensor_lists import count_step, gather

__all__ = ["adamw_group_"]


def adamw_group_(method: str, group: Mapping[str, Any], state: MutableMapping[Tensor, Any]) -> None:
    """One step of AdamW for every parameter of a group that has a gradient.

    Args:
        method: The optimizer's name, for errors.
        group: ``params``, ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``maximize``.
        state: The optimizer's ``state``; a parameter's ``exp_avg``, ``exp_avg_sq`` and ``step`` are kept there.
    """
    b1, b2 = group["betas"]
    for x, g, m, v in gather(method, group, state, ("exp_avg", "exp_avg_sq"), count_step):
        adamw_(
            x,
            list(torch._foreach_neg(g)) if group["maximize"] else g,
            m,
            v,
            lr=float(group["lr"]),
            t=state[x[0]]["step"],
            b1=b1,
            b2=b2,
            eps=group["eps"],
            wd=group["weight_decay"],
        )
