"""What releases cost: epsilon, delta and noise, by the accountants of dp-accounting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

from lightrail.errors import ConfigurationError, closest
from lightrail.options import between, non_negative, positive
from lightrail.privacy.accountant import LARGE_EPSILON, Kinds, accountant_of, by_kind, composed, event_of, library
from lightrail.privacy.events import Event

__all__ = ["ACCOUNTANTS", "RunningEpsilon", "calibrated", "checked_accountant", "delta_of", "epsilon_of"]

ACCOUNTANTS = ("pld", "rdp")

_LARGEST_NOISE = 2.0**20


def checked_accountant(accountant: str) -> str:
    """One of :data:`ACCOUNTANTS`, or an error that says why not.

    Args:
        accountant: The word that the user typed.

    Raises:
        ConfigurationError: It is none, or one that may understate epsilon.

    Example:
        >>> checked_accountant("pld")
        'pld'
    """
    if accountant in ACCOUNTANTS:
        return accountant
    if accountant in ("gdp", "clt", "gaussian"):
        remedy = "Take accountant=pld: a central limit understates epsilon for sampled batches, and guarantees nothing."
    elif accountant == "prv":
        remedy = "Take accountant=pld: the same bound without the error that prv adds to it."
    else:
        remedy = f"{closest(str(accountant), ACCOUNTANTS)}Take accountant=pld."
    raise ConfigurationError(
        f"there is no accountant '{accountant}'",
        found=f"accountant={accountant}",
        allowed="pld (privacy loss distributions, tight), rdp (Rényi, looser by about a tenth)",
        remedy=remedy,
    )


def epsilon_of(events: Sequence[Event], delta: float, accountant: str = "pld", interval: float = 1e-4) -> float:
    r"""The epsilon that releases on the same records spend together.

    .. math:: \varepsilon(\delta) = \min\{\varepsilon : P(M(D) \in S) \le e^\varepsilon P(M(D') \in S) + \delta\}

    for all sets S and all D, D' that differ by one added or removed record; an upper bound.

    Args:
        events: The releases, in any order; later ones may depend on what earlier ones released.
        delta: Target delta, in (0, 1).
        accountant: ``pld``, tight, or ``rdp``, looser by 7 to 15 percent.
        interval: Width of the grid of privacy losses, greater than 0; only of ``pld``. Where epsilon is beyond 100,
            the grid is coarser in proportion, and beyond a million the bound is that of ``rdp``.

    Returns:
        Epsilon; infinity where an event has no noise, 0 where there is none.

    Raises:
        ConfigurationError: An option is out of range.
        PluginError: The extra ``privacy`` is not installed.

    Example:
        >>> round(epsilon_of([Event(noise=8.0, steps=100, batch=10, records=10)], delta=1e-5), 3)
        5.68
        >>> epsilon_of([Event(noise=0.0, steps=1, batch=1, records=10)], delta=1e-5)
        inf

    Reference:
        Koskela, Jälkö, Honkela: Computing Tight Differential Privacy Guarantees Using FFT (AISTATS 2020);
        Mironov: Rényi Differential Privacy (CSF 2017).
    """
    between(0.0, 1.0, closed="neither", delta=delta)
    kinds = _checked(events, accountant, interval)
    if kinds and any(z == 0 for z, _ in kinds):
        return math.inf
    return _epsilon(kinds, float(delta), accountant, float(interval)) if kinds else 0.0


def delta_of(events: Sequence[Event], epsilon: float, accountant: str = "pld", interval: float = 1e-4) -> float:
    """The delta at which releases stay within an epsilon; the counterpart of :func:`epsilon_of`.

    Args:
        events: The releases.
        epsilon: At least 0.
        accountant: ``pld`` or ``rdp``.
        interval: Width of the grid of privacy losses, greater than 0.

    Returns:
        Delta in [0, 1]; 1 where an event has no noise, 0 where there is none.

    Raises:
        ConfigurationError: An option is out of range.
        PluginError: The extra ``privacy`` is not installed.

    Example:
        >>> f"{delta_of([Event(noise=8.0, steps=100, batch=10, records=10)], epsilon=5.6796):.1e}"
        '1.0e-05'
    """
    non_negative(epsilon=epsilon)
    kinds = _checked(events, accountant, interval)
    if not kinds or any(z == 0 for z, _ in kinds):
        return 1.0 if kinds else 0.0
    return float(composed(kinds, accountant, interval).get_delta(epsilon))


def calibrated(
    events_at: Callable[[float], Sequence[Event]],
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    tolerance: float = 1e-4,
) -> float:
    r"""The smallest noise whose releases stay within a target.

    .. math:: z^* = \min\{z : \varepsilon(\mathrm{events}(z), \delta) \le \varepsilon^*\}

    Args:
        events_at: The planned releases at a noise z > 0; their epsilon must fall as z grows.
        epsilon: Target, in (0, 1000].
        delta: Target delta, in (0, 1).
        accountant: ``pld`` or ``rdp``.
        tolerance: How far above :math:`z^*` on its grid the answer may lie, greater than 0.

    Returns:
        A noise within the target.

    Raises:
        ConfigurationError: An option is out of range, or no noise meets the target.
        PluginError: The extra ``privacy`` is not installed.

    Deviations:
        ``pld`` searches on a grid of 1e-3, for which the noise is up to a thousandth larger; the answer is within the
        target on the grid of 1e-4 too.

    Example:
        >>> z = calibrated(lambda z: [Event(z, 100, 10, 10)], epsilon=5.68, delta=1e-5)
        >>> abs(z - 8.0) < 1e-3
        True
    """
    positive(tolerance=tolerance)
    between(0.0, 1000.0, closed="right", epsilon=epsilon)
    between(0.0, 1.0, closed="neither", delta=delta)
    checked_accountant(accountant)

    # A grid that costs a tenth of the time; it only makes the noise larger, by less than a thousandth.
    interval = min(1e-3, max(1e-4, 1e-3 * epsilon))

    def within(noise: float, interval: float = interval) -> bool:
        return epsilon_of(events_at(noise), delta, accountant, interval) <= epsilon

    low, high = 1.0, 1.0
    if not within(high) and not within(_LARGEST_NOISE):
        raise _unreachable(epsilon, delta, epsilon_of(events_at(_LARGEST_NOISE), delta, accountant, interval))
    while not within(high):
        low, high = high, 2 * high
    while low == high or within(low):
        if low <= tolerance:
            return low
        low, high = low / 2, low
    dp_accounting = library()
    noise = dp_accounting.calibrate_dp_mechanism(
        lambda: accountant_of(accountant, interval * max(1.0, epsilon / LARGE_EPSILON)),
        lambda noise: event_of(by_kind(events_at(noise))),
        epsilon,
        delta,
        # Wider than was found, as beyond LARGE_EPSILON the grids differ.
        dp_accounting.ExplicitBracketInterval(0.98 * low, 1.02 * high),
        tol=tolerance,
    )
    while not within(noise, 1e-4):
        noise += tolerance
    return noise


def _unreachable(epsilon: float, delta: float, least: float) -> ConfigurationError:
    return ConfigurationError(
        f"no noise keeps this run within epsilon {epsilon:g} at delta {delta:g}",
        found=f"epsilon {least:.4g} with a noise multiplier of {_LARGEST_NOISE:g}",
        allowed="a target above what the steps cost whatever the noise",
        remedy="Raise epsilon or delta, or take fewer steps; releases whose noise is given must fit too.",
    )


def _checked(events: Sequence[Event], accountant: str, interval: float) -> Kinds:
    checked_accountant(accountant)
    positive(interval=interval)
    return by_kind(events)


@lru_cache(maxsize=256)
def _epsilon(kinds: Kinds, delta: float, accountant: str, interval: float) -> float:
    return float(composed(kinds, accountant, interval).get_epsilon(delta))


class RunningEpsilon:
    """The epsilon of a ledger that grows, as often as a share of the time allows.

    Args:
        delta: Target delta, in (0, 1).
        accountant: ``pld`` or ``rdp``.
        share: The share of the time that may go into it, greater than 0 and at most 1.
        clock: Tells the time in seconds.

    Raises:
        ConfigurationError: An option is out of range.

    Example:
        >>> running = RunningEpsilon(delta=1e-5, accountant="rdp")
        >>> round(running.value([Event(noise=8.0, steps=100, batch=10, records=10)]), 2)
        6.12
    """

    def __init__(
        self,
        delta: float,
        accountant: str = "pld",
        share: float = 0.1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        between(0.0, 1.0, closed="neither", delta=delta)
        between(0.0, 1.0, closed="right", share=share)
        self._delta = delta
        self._accountant = checked_accountant(accountant)
        self._share = share
        self._clock = clock
        self._due = -math.inf

    def value(self, events: Sequence[Event]) -> float | None:
        """Epsilon of all these events, or ``None`` where it is not yet time to compute it again.

        Args:
            events: Everything released so far.

        Raises:
            PluginError: The extra ``privacy`` is not installed.
        """
        if self._clock() < self._due:
            return None
        library()  # its import is no part of what the next one costs
        start = self._clock()
        epsilon = epsilon_of(events, self._delta, self._accountant, interval=1e-3)
        end = self._clock()
        self._due = end + (end - start) / self._share
        return epsilon
