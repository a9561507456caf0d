"""The suites over what is installed: one case a plugin and check, found through the catalogue."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass

from lightrail import catalogue
from lightrail.testing.suite import Check, NonConformance, Outcome, Suite, examine, name_of

__all__ = ["SUITES", "Case", "installed_cases", "suite_of"]

SUITES = {
    "optimizer": "lightrail.testing.optimizer:OptimizerSuite",
    "transform": "lightrail.testing.transform:TransformSuite",
    "schedule": "lightrail.testing.schedule:ScheduleSuite",
    "task": "lightrail.testing.task:TaskSuite",
    "data": "lightrail.testing.data:DataSuite",
    "model": "lightrail.testing.model:ModelSuite",
}


def suite_of(kind: str) -> type[Suite]:
    """The suite of a kind."""
    module, name = SUITES[kind].split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Case:
    """One check of one installed plugin; as text, its id: ``optimizer-adamw-is_deterministic``."""

    kind: str
    name: str
    check: Check

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{name_of(self.check)}"

    def outcome(self) -> Outcome:
        """Runs the check; a plugin that lacks an extra is skipped, one that is broken otherwise has failed."""
        try:
            plugin = catalogue.load(self.kind, self.name)
        except Exception as error:
            record = catalogue.find(self.kind, self.name)
            if record.state == "missing_extra":
                return Outcome(name_of(self.check), "skipped", record.reason)
            return Outcome(name_of(self.check), "failed", f"it cannot be loaded: {error}", error)
        return examine(self.check, plugin)


def installed_cases(kinds: Collection[str] = (), distribution: str = "") -> list[Case]:
    """Every check of every installed plugin.

    Args:
        kinds: Which kinds; all that have a suite where none is given.
        distribution: The one distribution whose plugins are meant; all where none is given.

    Returns:
        In the order of the kinds, then of the names, then of the suite.

    Raises:
        NonConformance: A kind has no suite.
    """
    unknown = sorted(set(kinds) - set(SUITES))
    if unknown:
        raise NonConformance(f"there is no suite for {', '.join(unknown)}; there are {', '.join(SUITES)}")
    return [
        Case(kind, name, check)
        for kind in SUITES
        if not kinds or kind in kinds
        for name in catalogue.available(kind)
        if not distribution or catalogue.find(kind, name).distribution == distribution
        for check in suite_of(kind).checks
    ]
