"""The suites over what is installed: one case a plugin and check, found through the catalogue."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass

from lightrail.catalogue.distributions import normalised
from lightrail.catalogue.plugin import Plugin, registered
from lightrail.errors import PluginError
from lightrail.options import one_of
from lightrail.testing.suite import Check, Outcome, Suite, examine, name_of

__all__ = ["SUITES", "Case", "installed_cases", "suite_of"]

SUITES = {
    "optimizer": "lightrail.testing.optimizer:OptimizerSuite",
    "transform": "lightrail.testing.transform:TransformSuite",
    "schedule": "lightrail.testing.schedule:ScheduleSuite",
    "batching": "lightrail.testing.batching:BatchingSuite",
    "task": "lightrail.testing.task:TaskSuite",
    "data": "lightrail.testing.data:DataSuite",
    "model": "lightrail.testing.model:ModelSuite",
    "denoiser": "lightrail.testing.denoiser:DenoiserSuite",
    "sampler": "lightrail.testing.sampler:SamplerSuite",
    "sampler_wrapper": "lightrail.testing.sampler_wrapper:SamplerWrapperSuite",
    "time_grid": "lightrail.testing.time_grid:TimeGridSuite",
    "search": "lightrail.testing.search:SearchSuite",
    "guidance": "lightrail.testing.guidance:GuidanceSuite",
    "measurement": "lightrail.testing.measurement:MeasurementSuite",
    "privacy": "lightrail.testing.privacy:PrivacySuite",
    "federated": "lightrail.testing.federated:FederatedSuite",
    "compressor": "lightrail.testing.compressor:CompressorSuite",
    "partition": "lightrail.testing.partition:PartitionSuite",
    "topology": "lightrail.testing.topology:TopologySuite",
    "sweep": "lightrail.testing.sweep:SweepSuite",
    "launch": "lightrail.testing.launch:LaunchSuite",
}


def suite_of(kind: str) -> type[Suite]:
    """The suite of a kind."""
    module, name = SUITES[kind].split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Case:
    """One check of one installed plugin; as text, its id: ``optimizer-adamw-is_deterministic``."""

    plugin: Plugin
    check: Check

    @property
    def label(self) -> str:
        """The kind and the name, with the distribution where two claim the name."""
        owner = f"{self.plugin.distribution}:" if self.plugin.state == "duplicate" else ""
        return f"{self.plugin.kind}-{owner}{self.plugin.name}"

    def __str__(self) -> str:
        return f"{self.label}-{name_of(self.check)}"

    def outcome(self) -> Outcome:
        """Runs the check; a plugin that lacks an extra is skipped, one that is broken otherwise has failed."""
        try:
            self.plugin.check_extras()
        except PluginError as error:
            return Outcome(name_of(self.check), "skipped", f"{error.what}: {error.found}. {error.remedy}")
        try:
            plugin = self.plugin.load()
        except Exception as error:
            return Outcome(name_of(self.check), "failed", str(error), error)
        return examine(self.check, plugin)


def installed_cases(kinds: Collection[str] = (), distribution: str = "") -> list[Case]:
    """Every check of every installed plugin.

    Args:
        kinds: Which kinds; all that have a suite where none is given.
        distribution: The one distribution whose plugins are meant; all where none is given.

    Returns:
        In the order of the kinds, then of the names, then of the suite.

    Raises:
        ConfigurationError: A kind has no suite.
    """
    for kind in kinds:
        one_of(SUITES, kind=kind)
    return [
        Case(plugin, check)
        for kind in SUITES
        if not kinds or kind in kinds
        for plugin in registered(kind)
        if not distribution or normalised(plugin.distribution) == normalised(distribution)
        for check in suite_of(kind).checks
    ]
