"""Thresholdout without a trainer: the rule, its noise, and the file in which several runs share one budget."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightrail.errors import ConfigurationError, DataError, PluginError, UserError
from lightrail.files import replace_file, tells_unwritable
from lightrail.options import at_least, non_negative

__all__ = ["BudgetExhausted", "ThresholdoutRule", "laplace", "shared_rule"]


class BudgetExhausted(UserError):
    """The held-out data have answered as often as they can be trusted to."""


_SYSTEM = random.SystemRandom()


def laplace(b: float, uniform: Callable[[], float] = _SYSTEM.random) -> float:
    """One draw from the Laplace distribution of scale b, as b (ln u − ln v).

    Args:
        b: At least 0; the standard deviation is √2 b.
        uniform: Draws from [0, 1); the system's own by default, which no seed repeats.

    Returns:
        The draw.

    Example:
        >>> laplace(0.0)
        0.0
    """
    u, v = 1 - uniform(), 1 - uniform()
    return b * (math.log(u) - math.log(v)) if b else 0.0


@dataclass
class ThresholdoutRule:
    """Answers a question φ about held-out data from the training data, unless the two disagree.

    With T̂ = T + Lap(2s) and η = Lap(4s), drawn anew for each question, the answer is

    φ(hold) + Lap(s)  where |φ(hold) − φ(train)| > T̂ + η,  else φ(train)

    An answer of the first kind spends one of ``budget`` and draws T̂ anew; without any left there is no answer.

    Args:
        threshold: T, at least 0.
        scale: s, at least 0; with 0 nothing is random.
        budget: Answers from the held-out data, at least 0.
        left: Those left; ``None`` for all.
        queries: Questions asked so far.
        noisy_threshold: T̂; ``None`` to draw it.
        is_deterministic: Whether the noise is a function of the number of the question: for tests, without a guarantee.

    Raises:
        ConfigurationError: A number is out of range.

    Example:
        >>> rule = ThresholdoutRule(threshold=0.1, scale=0.0, budget=1)
        >>> rule.ask(hold=0.55, train=0.6), rule.ask(hold=0.4, train=0.6), rule.left
        (0.6, 0.4, 0)

    Reference:
        C. Dwork, V. Feldman, M. Hardt, T. Pitassi, O. Reingold and A. Roth (2015), Generalization in Adaptive Data
        Analysis and Holdout Reuse, NeurIPS, arXiv 1506.02629, section 4 (algorithm Thresholdout).
    """

    threshold: float
    scale: float
    budget: int = 100
    left: int | None = None
    queries: int = 0
    noisy_threshold: float | None = None
    is_deterministic: bool = False

    def __post_init__(self) -> None:
        non_negative(threshold=self.threshold, scale=self.scale)
        at_least(0, budget=self.budget)
        self.left = self.budget if self.left is None else self.left
        if self.noisy_threshold is None:
            self.noisy_threshold = self.threshold + self._noise(2)

    def _noise(self, times: float) -> float:
        """Lap(times · s)."""
        if not self.is_deterministic:
            return laplace(times * self.scale)
        return laplace(times * self.scale, random.Random(f"{self.queries} {times}").random)

    def ask(self, hold: float, train: float) -> float:
        """One question.

        Args:
            hold: φ(hold): a mean over the held-out records of values in [0, 1].
            train: φ(train): the same over training records.

        Returns:
            The answer; with its noise it may leave [0, 1].

        Raises:
            BudgetExhausted: Nothing of the budget is left.
        """
        if not self.left:
            raise BudgetExhausted(
                "the validation data have answered as often as they can be trusted to",
                found=f"a budget of {self.budget} that {self.queries} questions have spent",
                allowed="questions on which training and validation data agree, once the budget is spent none",
                remedy="Stop here and judge by the test; or validate less often, regularise more, or take fresh "
                "validation data (with a new ledger).",
            )
        assert self.noisy_threshold is not None
        self.queries += 1
        if abs(hold - train) > self.noisy_threshold + self._noise(4):
            self.left -= 1
            self.noisy_threshold = self.threshold + self._noise(2)
            return hold + self._noise(1)
        return train

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values: whoever could set it back could ask again."""
        return asdict(self)


@contextlib.contextmanager
def shared_rule(path: Path, rule: ThresholdoutRule) -> Iterator[ThresholdoutRule]:
    """The rule that stands in a file, for one question at a time; what it spends is written when the block ends.

    Args:
        path: The file; made where it is not there.
        rule: What it begins with, and has to agree with.

    Yields:
        The rule of the file. The other runs that share it wait.

    Raises:
        DataError: The file holds something else.
        ConfigurationError: It was begun with another threshold, scale or budget.
        RunFolderError: It cannot be written.
    """
    with tells_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        shared = _read(path, rule)
        try:
            yield shared
        finally:
            replace_file(path, json.dumps(shared.state_dict(), indent=2).encode())


def _read(path: Path, rule: ThresholdoutRule) -> ThresholdoutRule:
    if not path.exists():
        return rule
    try:
        found = ThresholdoutRule(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no ledger of thresholdout",
            found=str(error).splitlines()[0],
            allowed="a file that thresholdout wrote",
            remedy="Name another file with callback.thresholdout.ledger=FILE.",
        ) from error
    for option in ("threshold", "scale", "budget", "is_deterministic"):
        if getattr(found, option) != getattr(rule, option):
            raise ConfigurationError(
                f"the ledger {path} was begun with another {option}",
                found=f"{option}={getattr(rule, option)}",
                allowed=f"{option}={getattr(found, option)}, as in the ledger",
                remedy="Let all runs that share a ledger have the same options and the same validation data; "
                "other data need a ledger of their own.",
            )
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError as error:
        raise PluginError(
            "a ledger of thresholdout cannot be shared on this system",
            found="no locks of files (module fcntl)",
            allowed="Linux or macOS",
            remedy="Leave callback.thresholdout.ledger out; each run has a budget of its own then.",
        ) from error
    # The ledger is replaced as a whole, so the lock is another file, which stays.
    with tells_unwritable(path):
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
