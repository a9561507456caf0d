"""AdamW, Lion and SGD as functions of lists and options, for methods that run one of them inside a subspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightrail.options import between, non_negative, positive
from lightrail_optimizers.adam_rule import adamw_
from lightrail_optimizers.lion import lion
from lightrail_optimizers.momentum_rule import momentum_step_
from lightrail_optimizers.tensor_lists import add_scaled_, shrink_

__all__ = ["ADAMW", "LION", "MOMENTUM", "SGD", "InnerRule", "check_inner_options"]


@dataclass(frozen=True)
class InnerRule:
    """One update in a form that is the same for all.

    Args:
        state_names: The tensors that it keeps, zeros at first.
        update: ``update(options, t, x, g, *states, lr=, wd=)`` over lists, in place; ``t`` counts from 1.
    """

    state_names: tuple[str, ...]
    update: Callable[..., None]


def _adamw(options: Mapping[str, Any], t: int, *lists: list[Tensor], lr: float, wd: float) -> None:
    x, g, m, v = lists
    b1, b2 = options["betas"]
    adamw_(x, g, m, v, lr=lr, t=t, b1=b1, b2=b2, eps=options["eps"], wd=wd)


def _lion(options: Mapping[str, Any], t: int, *lists: list[Tensor], lr: float, wd: float) -> None:
    x, g, m = lists
    b1, b2 = options["betas"]
    lion(x, g, m, lr=lr, b1=b1, b2=b2, wd=wd)


def _momentum(options: Mapping[str, Any], t: int, *lists: list[Tensor], lr: float, wd: float) -> None:
    x, g, b = lists
    shrink_(x, lr * wd)  # decoupled, as for the others
    momentum_step_(x, g, b, lr=lr, b=options["momentum"])


def _sgd(options: Mapping[str, Any], t: int, *lists: list[Tensor], lr: float, wd: float) -> None:
    x, g = lists
    shrink_(x, lr * wd)
    add_scaled_(x, g, -lr)


ADAMW = InnerRule(("momentum", "square"), _adamw)
LION = InnerRule(("momentum",), _lion)
MOMENTUM = InnerRule(("momentum",), _momentum)
SGD = InnerRule((), _sgd)


def check_inner_options(options: Mapping[str, Any]) -> None:
    """Raises where an option of these rules is out of range; ``adamw_`` before a name makes no difference."""
    for name, value in options.items():
        match name.removeprefix("adamw_"):
            case "lr" | "weight_decay":
                non_negative(**{name: value})
            case "eps":
                positive(**{name: value})
            case "momentum":
                between(0.0, 1.0, **{name: value})
            case "betas":
                between(0.0, 1.0, **{f"{name}[{i}]": beta for i, beta in enumerate(value)})
