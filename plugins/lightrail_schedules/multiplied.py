"""The scheduler behind every schedule here: each group's learning rate times one number a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightrail.traits import Traits

__all__ = ["Multiplied", "declares"]

Function = TypeVar("Function", bound=Callable[..., Any])


def declares(traits: Traits) -> Callable[[Function], Function]:
    """Puts its card on a function."""

    def mark(function: Function) -> Function:
        function.traits = traits  # type: ignore[attr-defined]
        return function

    return mark


class Multiplied(LambdaLR):
    """``lr_t = lr · multiplier(t)`` in every group, lr being the group's own, a number or a tensor.

    Its state is plain numbers. A resumed run may have another length: the shape is that of the new length from the
    first step on.

    Args:
        optimizer: Any torch optimizer.
        multiplier: From the step, counted from 0, to a number.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4.0)
        >>> schedule = Multiplied(optimizer, lambda t: 1 / (t + 1))
        >>> optimizer.step(); schedule.step()
        >>> optimizer.param_groups[0]["lr"]
        2.0
    """

    def __init__(self, optimizer: Optimizer, multiplier: Callable[[int], float]) -> None:
        self._multiplier = multiplier
        super().__init__(optimizer, multiplier)

    def get_lr(self) -> list[float | Tensor]:
        # In double precision whatever holds the rate, so that a resumed run finds the very same number.
        factor = self._multiplier(self.last_epoch)
        return [float(base) * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": [float(lr) for lr in self.base_lrs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            # The checkpoint of the optimizer holds the learning rate of the old length.
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
