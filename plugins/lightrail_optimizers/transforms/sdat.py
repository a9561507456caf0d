"""SDAT: a sharpness-aware step whose climb sees the task loss alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightrail.errors import ClosureError, ConfigurationError
from lightrail.options import at_least, non_negative
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.transforms.sam import climb

__all__ = ["SDAT", "one_objective"]


def one_objective(objectives: Any, which: int | str) -> Tensor:
    """One of a task's losses, by its place or by its name.

    Args:
        objectives: What the task's ``objectives(batch)`` returns: a sequence, a mapping or a 1-d tensor.
        which: From 0, in the order of the task; or the key of a mapping.

    Raises:
        ClosureError: There is no such loss.

    Example:
        >>> import torch
        >>> losses = {"task": torch.tensor(1.0), "domain": torch.tensor(2.0)}
        >>> one_objective(losses, "domain").item(), one_objective(losses, 0).item()
        (2.0, 1.0)
    """
    names = list(objectives) if isinstance(objectives, Mapping) else []
    if isinstance(which, str):
        if which in names:
            return objectives[which]
    else:
        losses = list(objectives.values()) if names else list(objectives)
        if which < len(losses):
            return losses[which]
        names = names or [str(place) for place in range(len(losses))]
    raise ClosureError(
        f"the task has no objective '{which}'",
        found=f"objectives(batch) returns {', '.join(names) or 'losses without names'}",
        allowed="the name of one of them, or its place from 0",
        remedy="Set transform.sdat.objective to the task loss among them.",
    )


class SDAT(Transform):
    """Smooth domain adversarial training: climbs along the gradient of the task loss alone.

    ``e = rho h / ||h||`` with h the gradient of the task loss; the optimizer steps from x with the gradient of the
    whole loss, adversarial terms included, at ``x + e``.

    A parameter that the task loss does not depend on, such as those of a domain discriminator, has no part in the
    norm and is not moved by the climb. Radii of 0.02 (vision transformers) and 0.05 (residual networks) are usual.

    Args:
        rho: Radius, >= 0; 0 is the optimizer without SDAT, bit for bit, at the price of one evaluation.
        objective: Which of the task's ``objectives`` is the task loss: its place from 0, or its name.

    Raises:
        ConfigurationError: An option out of range.
        ClosureError: The task offers no ``objectives``, or none of that place or name.

    Guarantees:
        All evaluations see the same micro-batches and the same dropout masks; BatchNorm statistics move once.

    Deviations:
        The published code evaluates twice a step, first the task loss and then the whole; here a step begins with the
        gradient of the whole loss at x, which makes three. It also steps the discriminator by an optimizer of its own;
        here one optimizer moves everything, so give the discriminator a parameter group where its rate shall differ.

    Example:
        >>> import torch
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> losses = lambda batch: [w[0] ** 2 / 2, w[1] ** 2 / 2]
        >>> closure = Closure(lambda batch: sum(losses(batch)), [w], torch.zeros(1), objectives_fn=losses)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [SDAT(rho=1.0)])
        >>> loss = optimizer.step(closure)  # climbs to (4, 4)
        >>> [round(value, 4) for value in w.tolist()]
        [2.6, 3.6]

    Reference:
        Rangwani, Aithal, Mishra, Jain and Babu, 2022, "A Closer Look at Smoothness in Domain Adversarial Training",
        arXiv:2206.08213, Figure 1.
    """

    traits = Traits(
        rule="g = gradient of the loss at x + rho h / ||h||, h the gradient of the task loss",
        paper=(
            "Rangwani, Aithal, Mishra, Jain, Babu, 2022, A Closer Look at Smoothness in Domain Adversarial Training, "
            "arXiv:2206.08213"
        ),
        state=0,
        extra_evaluations=2,
        needs_closure=True,
        needs_objectives=True,
        example={"rho": 0.05},
    )

    def __init__(self, rho: float = 0.05, objective: int | str = 0) -> None:
        non_negative(rho=rho)
        if isinstance(objective, bool) or not isinstance(objective, int | str):
            raise ConfigurationError(
                "objective is neither a place nor a name",
                found=f"objective={objective!r}",
                allowed="a whole number of at least 0, or the name of an objective",
                remedy="Set transform.sdat.objective=0, or to a name.",
            )
        if isinstance(objective, int):
            at_least(0, objective=objective)
        self.rho = rho
        self.objective = objective
        self._task_loss: Tensor | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.rho == 0:
            return
        self._task_loss, h = closure.gradient_of(lambda batch: one_objective(closure.objectives(batch), self.objective))
        with closure.at(climb(closure.params, h, self.rho)):
            closure()

    def logged(self) -> dict[str, float]:
        return {} if self._task_loss is None else {"task_loss": float(self._task_loss)}
