"""The accountants of dp-accounting, imported when first asked, and releases in its words."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from lightrail.errors import PluginError
from lightrail.privacy.events import Event, merged

__all__ = ["Kinds", "accountant_of", "by_kind", "composed", "event_of", "library"]

# Above this epsilon the grid grows with it: the same relative error, and memory that stays bounded.
LARGE_EPSILON = 100.0

# Beyond this, exponentials overflow on the grid.
_HUGE_EPSILON = 1e6

# Enough to tell the size of epsilon, and quick.
_ROUGH_ORDERS = (1.25, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

# Each kind of release: its noise; the two terms of its rate, lowest, and how often it was made.
Kinds = tuple[tuple[float, tuple[int, int, int]], ...]


def _is_news(record: logging.LogRecord) -> bool:
    return "failed to converge" not in record.getMessage()


def library() -> Any:
    """The module ``dp_accounting``.

    Raises:
        PluginError: The extra ``privacy`` is not installed.
    """
    # At small orders of Renyi divergences a series may not converge; they are left out, which is no news to anybody.
    logging.getLogger("absl").addFilter(_is_news)
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise PluginError(
            "the account of privacy needs an extra that is not installed",
            found=f"no {error.name or 'dp_accounting'}",
            allowed="lightrail with the extra privacy",
            remedy="Run `pip install 'lightrail[privacy]'`.",
        ) from error
    _leave_streams_open()
    return dp_accounting


@cache
def _leave_streams_open() -> None:
    """The logger of dp-accounting keeps the standard error that it found, and closes it with its own handler."""
    from absl import logging as absl_logging

    handler = absl_logging.get_absl_handler()
    logging.root.removeHandler(handler)
    if handler.python_handler is not None:
        handler.python_handler.stream = sys.__stderr__


def by_kind(events: Sequence[Event]) -> Kinds:
    """The releases by kind, in an order of their own: epsilon does not depend on theirs.

    Args:
        events: The releases.

    Returns:
        For each kind z and ``(numerator of q, denominator of q, steps)``.

    Example:
        >>> by_kind([Event(2.0, 3, 8, 64), Event(1.0, 1, 8, 64), Event(2.0, 4, 1, 8)])
        ((1.0, (1, 8, 1)), (2.0, (1, 8, 7)))
    """
    counts: dict[tuple[float, int, int], int] = {}
    for event in events:
        kind = (float(event.noise), event.rate.numerator, event.rate.denominator)
        counts[kind] = counts.get(kind, 0) + event.steps
    return tuple(sorted((z, (b, n, steps)) for (z, b, n), steps in counts.items() if steps))


def event_of(kinds: Kinds) -> Any:
    """The releases as one event of dp-accounting.

    Args:
        kinds: What :func:`by_kind` returned.
    """
    dp_accounting = library()
    # Releases that see everything are one Gaussian exactly; composed one by one, each would add an error of the grid.
    whole = [z / math.sqrt(steps) for z, (b, n, steps) in kinds if b == n]
    parts = [dp_accounting.GaussianDpEvent(merged(*whole))] if whole else []
    for z, (b, n, steps) in kinds:
        if b < n:
            sampled = dp_accounting.PoissonSampledDpEvent(b / n, dp_accounting.GaussianDpEvent(z))
            parts.append(dp_accounting.SelfComposedDpEvent(sampled, steps))
    return dp_accounting.ComposedDpEvent(parts)


def accountant_of(name: str, interval: float) -> Any:
    """A fresh accountant, for one added or removed record.

    Args:
        name: ``pld`` or ``rdp``.
        interval: Width of the grid of privacy losses; only of ``pld``.
    """
    dp_accounting = library()
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if name == "rdp":
        return dp_accounting.rdp.RdpAccountant(neighboring_relation=relation)
    return dp_accounting.pld.PLDAccountant(relation, value_discretization_interval=interval)


def composed(kinds: Kinds, name: str, interval: float) -> Any:
    """An accountant that has seen all releases, on a grid that suits their size.

    Args:
        kinds: What :func:`by_kind` returned.
        name: ``pld`` or ``rdp``.
        interval: Width of the grid, of which more than 100 of epsilon make a multiple.
    """
    event = event_of(kinds)
    if name == "rdp":
        return accountant_of("rdp", interval).compose(event)
    size = library().rdp.RdpAccountant(_ROUGH_ORDERS).compose(event).get_epsilon(1e-5)
    if not size <= _HUGE_EPSILON:
        return accountant_of("rdp", interval).compose(event)
    return accountant_of("pld", interval * max(1.0, size / LARGE_EPSILON)).compose(event)
