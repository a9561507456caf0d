"""What the trials say of a claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from lightrail.bench.claims.outcome import Trial
from lightrail.traits import Claim

__all__ = ["Comparison", "compare", "verdict"]

REPRODUCES = "reproduces"
DOES_NOT = "does not reproduce"
UNSEEN = "cannot be seen at this size"


@dataclass(frozen=True)
class Comparison:
    """A method beside its baseline, seed by seed.

    Args:
        differences: Final merit minus the baseline's, one a seed; negative is better.
        steps: The share of the passes after which the baseline's mean final merit was reached, one a seed; infinite
            where it never was.
        baseline: The baseline's mean final merit.
    """

    differences: tuple[float, ...]
    steps: tuple[float, ...]
    baseline: float

    @property
    def mean(self) -> float:
        return mean(self.differences) if all(map(math.isfinite, self.differences)) else math.inf

    @property
    def error(self) -> float:
        """The standard error of the mean difference."""
        if not math.isfinite(self.mean) or len(self.differences) < 2:
            return math.inf
        return stdev(self.differences) / len(self.differences) ** 0.5


def compare(trials: Sequence[Trial], baseline: Sequence[Trial], passes: float) -> Comparison:
    """Pairs the trials of equal seeds."""
    goal = mean(trial.final for trial in baseline)
    return Comparison(
        tuple(mine.final - theirs.final for mine, theirs in zip(trials, baseline, strict=True)),
        tuple(trial.passes_to(goal) / passes for trial in trials),
        goal,
    )


def verdict(claim: Claim, found: Comparison) -> str:
    """Whether the claim is borne out.

    A difference counts as seen where it exceeds twice its standard error over the seeds.

    Args:
        claim: What is promised.
        found: What was measured.

    Returns:
        ``reproduces``, ``does not reproduce``, or ``cannot be seen at this size``.
    """
    if claim.steps is not None:
        share = median(found.steps)
        if share <= claim.steps:
            return REPRODUCES
        # Faster, though by less than was promised, is neither a yes nor a no at a size that nobody promised it for.
        return DOES_NOT if share >= 1 else UNSEEN
    allowed = claim.margin * abs(found.baseline)
    if not math.isfinite(found.mean):
        return DOES_NOT
    if found.mean + 2 * found.error <= allowed:
        return REPRODUCES
    return DOES_NOT if found.mean - 2 * found.error > allowed else UNSEEN
