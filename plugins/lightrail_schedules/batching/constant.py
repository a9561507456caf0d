"""The same number of samples in every step."""

from __future__ import annotations

from lightrail import Batching, Extent, Portion, Traits
from lightrail.options import at_least
from lightrail_schedules.batching.filled import require_filled
from lightrail_schedules.batching.rate import rate_factor

__all__ = ["Constant"]


class Constant(Batching):
    """Every step has the same number of samples, accumulated where no device holds them at once.

    ``b_t = b``: what the data's own batch and ``trainer.accumulate`` would make of it, said in samples, over all
    devices.

    Args:
        batch_size: b, samples a step, >= 1.
        lr_rule: How the learning rate answers: times ``b/b0`` (linear), its root (sqrt), 1 (none), or what the
            optimizer calls for (auto); b0 is the data's own batch.
        micro_batch: Samples that a device evaluates at once at most; ``None`` for as many as fit.

    Raises:
        CompositionError: The data has fewer samples.

    Example:
        >>> Constant(batch_size=256).next(samples=0, step=0).samples
        256
    """

    traits = Traits(rule="b_t = b", example={"batch_size": 24})

    def __init__(self, batch_size: int, lr_rule: str = "none", micro_batch: int | None = None) -> None:
        at_least(1, batch_size=batch_size)
        super().__init__(micro_batch)
        self.batch_size = batch_size
        self.lr_rule = lr_rule
        self._factor = 1.0

    def begin(self, extent: Extent) -> None:
        require_filled(extent, **{"batching.batch_size": self.batch_size})
        self._factor = rate_factor(self.lr_rule, self.batch_size, extent)

    def next(self, samples: int, step: int) -> Portion:
        return Portion(self.batch_size, lr_factor=self._factor)
