"""The run's own optimizer at one node: one step at a time, its state kept from round to round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightrail.errors import CompositionError
from lightrail.federated.visit import fresh
from lightrail.step.closure import Closure
from lightrail.step.transform import TransformedOptimizer

if TYPE_CHECKING:
    from lightrail.federated.client_side import ClientSide

__all__ = ["NodeOptimizer"]


class NodeOptimizer:
    """An optimizer over the model that all nodes take turns with; what it remembers is one node's.

    Args:
        side: The nodes' data and model.

    Raises:
        CompositionError: The task configures its optimizer itself.
    """

    def __init__(self, side: ClientSide) -> None:
        run = side.run
        if run.optimizer is None:
            raise CompositionError(
                "a decentralised run needs an optimizer that it can make for each node",
                found="the task's own configure_optimizers",
                allowed="an optimizer by name",
                remedy="Choose one with +optimizer=NAME.",
            )
        self._side = side
        inner = run.optimizer(run.task)
        self._schedule = None if run.schedule is None else run.schedule(inner, side.method.rounds)
        self._optimizer = TransformedOptimizer(inner, fresh(run.transforms, run.task))
        self._inner: Optimizer = inner

    @property
    def lr(self) -> float:
        """Of the first group."""
        return float(self._inner.param_groups[0]["lr"])

    def step(self, batch: Any) -> float:
        """One step on a batch, from where the model is.

        Returns:
            The loss where the step began.
        """
        model = self._side.model
        with model.silent():
            loss = self._optimizer.step(Closure(model.loss, model.params, batch, module=model.task))
        if self._schedule is not None:
            self._schedule.step()
        return float(loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
