"""Batches that the data can fill, and those that it cannot."""

from __future__ import annotations

from lightrail import Extent
from lightrail.errors import CompositionError

__all__ = ["require_filled"]


def require_filled(extent: Extent, **option: int) -> None:
    """Raises where a step asks for more samples than an epoch has; the option is named in the error."""
    ((name, samples),) = option.items()
    if samples > extent.data_size:
        raise CompositionError(
            f"the data cannot fill a batch of {samples:,}",
            found=f"{name}={samples:,}, of {extent.data_size:,} training samples",
            allowed=f"at most {extent.data_size:,}",
            remedy="Lower it (or data.batch_size, where it is a multiple of that), or give more data.",
        )
