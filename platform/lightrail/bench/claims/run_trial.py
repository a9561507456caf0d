"""One trial of what works on whole runs: a run of ``train``."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Mapping
from typing import Any

from lightrail.bench.claims.as_run import overrides_of
from lightrail.bench.claims.outcome import Trial
from lightrail.bench.claims.problem import RunProblem
from lightrail.catalogue import load
from lightrail.errors import NonFiniteLoss
from lightrail.kinds import KINDS
from lightrail.run import compose

__all__ = ["trial_by_run"]


def trial_by_run(
    problem: str, kind: str, method: str, options: Mapping[str, Any], seed: int, behind: Mapping[str, Any]
) -> Trial:
    """One run; its merits are those of the validations, its passes the optimizer steps.

    Args:
        problem: The name of a plugin of the kind ``problem``.
        kind: Of the method.
        method: Its name; ``none`` for a run without one.
        options: Its options, and the learning rate as ``lr``.
        seed: Of the run.
        behind: The optimizer: ``{"optimizer": name, **options}``; empty for the problem's own.
    """
    cls = load("problem", problem)
    is_run = issubclass(cls, RunProblem)
    metric = cls.metric if is_run else "val_merit"
    with tempfile.TemporaryDirectory() as folder:
        common = [f"seed={seed}", "logger=[csv]", "trainer.accelerator=cpu", f"run.root={folder}"]
        words = [*(cls.overrides if is_run else overrides_of(problem)), *_optimizer(options, behind)]
        try:
            run = compose([*words, *_method(kind, method, options), *common])
            result = run.execute(show_progress=False)
        except NonFiniteLoss:
            return Trial((float(cls.passes),), (math.inf,))
        with open(result.folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(metric)]
    merits = [float(row[metric]) for row in rows]
    return Trial(tuple(float(row["step"]) + 1 for row in rows), tuple(merits), cls.outcome(merits))


def _optimizer(options: Mapping[str, Any], behind: Mapping[str, Any]) -> list[str]:
    chosen = [f"optimizer={behind['optimizer']}"] if behind else []
    own = {name: value for name, value in behind.items() if name != "optimizer"}
    rate = {"lr": options["lr"]} if "lr" in options else {}
    return [*chosen, *(f"optimizer.{name}={value}" for name, value in {**own, **rate}.items())]


def _method(kind: str, method: str, options: Mapping[str, Any]) -> list[str]:
    if method == "none":
        return []
    is_one = not KINDS[kind].many
    path = kind if is_one else f"{kind}.{method}"
    own = {name: "null" if value is None else value for name, value in options.items() if name != "lr"}
    return [f"+{kind}={method}" if is_one else f"+{kind}=[{method}]", *(f"{path}.{k}={v}" for k, v in own.items())]
