"""A method and what it is compared with."""

from __future__ import annotations

from lightrail.bench.claims.record import Measured
from lightrail.traits import Claim

__all__ = ["pair"]


def pair(kind: str, problem: str, method: str, claim: Claim) -> tuple[Measured, Measured]:
    """A method with its claim's options, and its baseline; neither is measured yet.

    An optimizer is compared with another, a batching likewise; a transform with the optimizer behind it alone; a
    callback with the run without it.

    Args:
        kind: Of the method.
        problem: The name of the problem.
        method: Its name.
        claim: What is promised.
    """
    tuned = claim.tuned if kind != "optimizer" else None
    baseline_options = dict(claim.baseline_options)
    behind = {"optimizer": claim.baseline, **baseline_options} if kind == "transform" else {}
    mine = Measured(kind, problem, method, dict(claim.options), behind=behind, tuned=tuned)
    if kind == "callback":
        return mine, Measured(kind, problem, "none", tuned=tuned)
    baseline_kind = "optimizer" if kind == "transform" else kind
    return mine, Measured(baseline_kind, problem, claim.baseline, baseline_options, tuned=tuned)
