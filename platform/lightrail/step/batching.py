"""How much data goes into a step over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightrail.step.closure import Closure
from lightrail.traits import Traits

__all__ = ["Batching", "Extent", "Portion"]


@dataclass(frozen=True)
class Extent:
    """What a batching knows of its run.

    Args:
        data_size: Samples in an epoch, over all ranks.
        batch_size: Samples that a step would have without it: the data's own batch on every rank.
        total_samples: Samples until the horizon, a sample counted every time it is seen; ``None`` where only a number
            of steps is given.
        scales_with_gradient: Whether the optimizer's update grows with the gradient, as SGD's does.
    """

    data_size: int
    batch_size: int
    total_samples: int | None
    scales_with_gradient: bool


@dataclass(frozen=True)
class Portion:
    """The data of one optimizer step.

    Args:
        samples: How many, over all ranks and micro-batches; rounded up to what divides evenly among them. At the end of
            an epoch a step has what is left, and a rest of less than a quarter of a step joins the one before.
        shape: What :meth:`Batching.reshape` is told: shares of the inputs' own sizes; ``None`` to leave them.
        lr_factor: What the learning rate is multiplied by for this step.
    """

    samples: int
    shape: tuple[float, ...] | None = None
    lr_factor: float = 1.0


class Batching:
    """Decides, before every optimizer step, how many samples it has, in which shape, and how the rate answers.

    Subclass it and override :meth:`next`; options are the arguments of ``__init__``. Samples that no device holds at
    once become micro-batches, whose gradients are accumulated.

    Args:
        micro_batch: Samples that a device evaluates at once at most; ``None`` for as many as its memory holds, measured
            as the run goes (on a processor, eight times ``data.batch_size``).

    Example:
        >>> class Doubling(Batching):
        ...     def next(self, samples, step):
        ...         return Portion(32 * 2 ** (step // 100))
        >>> Doubling().next(samples=0, step=250).samples
        128
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, micro_batch: int | None = None) -> None:
        self.micro_batch = micro_batch

    def begin(self, extent: Extent) -> None:
        """Called once, before the first step: here a size that the data cannot fill is refused."""

    def next(self, samples: int, step: int) -> Portion:
        """The data of the next step.

        Args:
            samples: Seen so far, over all ranks.
            step: Optimizer steps so far.
        """
        raise NotImplementedError

    def reshape(self, batch: Any, shape: tuple[float, ...]) -> Any:
        """A micro-batch with its inputs in the shape of its portion."""
        return batch

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        """Looks at the raw gradient of each step, for one whose traits have ``watches_gradient``.

        Args:
            params: With the gradient of the whole step in ``.grad``, averaged over ranks, before any transform.
            closure: What it may ask besides.
        """

    def logged(self) -> dict[str, float]:
        """Figures that are worth a curve in the report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
