"""Delta: the default for a number of records, and what is refused."""

from __future__ import annotations

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, between

__all__ = ["check_delta", "default_delta"]


def default_delta(records: int) -> float:
    r"""The largest power of ten that is at most :math:`1 / (10 n)`.

    Args:
        records: Number of records n, at least 1.

    Example:
        >>> default_delta(1437), default_delta(1000), default_delta(1001)
        (1e-05, 0.0001, 1e-05)
    """
    at_least(1, records=records)
    return float(f"1e-{len(str(10 * records - 1))}")


def check_delta(delta: float, records: int) -> float:
    """Refuses a delta at which publishing a record outright would pass for private.

    Args:
        delta: In (0, 1 / n).
        records: Number of records n.

    Returns:
        ``delta``.

    Raises:
        ConfigurationError: It is out of that range.
    """
    between(0.0, 1.0, closed="neither", delta=delta)
    if delta >= 1 / records:
        raise ConfigurationError(
            "delta is too large for this data",
            found=f"delta={delta:g} for {records} records",
            allowed=f"less than 1/{records} = {1 / records:.3g}: at that, publishing one record would count as private",
            remedy=f"Leave delta out for {default_delta(records):g}, or set a smaller one.",
        )
    return delta
