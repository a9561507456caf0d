"""A method and what it is compared with."""

from __future__ import annotations

from lightrail.bench.claims.record import Measured
from lightrail.traits import Claim

__all__ = ["pair"]


def pair(kind: str, problem: str, method: str, claim: Claim) -> tuple[Measured, Measured]:
    """A method with its claim's options, and its baseline; neither is measured yet.

    An optimizer is compared with another, a batching and a private method likewise; a transform with the optimizer
    behind it alone; a callback with the run without it.

    Args:
        kind: Of the method.
        problem: The name of the problem.
        method: Its name.
        claim: What is promised.
    """
    tuned = claim.tuned if kind != "optimizer" else None
    options, alone = dict(claim.options), dict(claim.baseline_options)
    if kind in ("transform", "callback"):
        behind = {"optimizer": claim.baseline, **alone}
        mine = Measured(kind, problem, method, options, behind=behind, tuned=tuned)
        if kind == "callback":
            return mine, Measured(kind, problem, "none", behind=behind, tuned=tuned)
        return mine, Measured("optimizer", problem, claim.baseline, alone, tuned=tuned)
    return Measured(kind, problem, method, options, tuned=tuned), Measured(
        kind, problem, claim.baseline, alone, tuned=tuned
    )
