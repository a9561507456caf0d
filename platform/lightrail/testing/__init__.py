"""Conformance suites by kind, for every plugin, its own author's included.

Run them over everything that is installed with ``pytest --lightrail-plugins``, over one distribution with
``pytest --lightrail-plugins=DIST``, over one kind with ``--lightrail-kind=optimizer``; or subclass a suite in a test
module. Nothing is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrail.testing.batching import BatchingSuite
    from lightrail.testing.compressor import CompressorSuite
    from lightrail.testing.data import DataSuite
    from lightrail.testing.denoiser import DenoiserSuite
    from lightrail.testing.federated import FederatedSuite
    from lightrail.testing.guidance import GuidanceSuite
    from lightrail.testing.installed import Case, installed_cases
    from lightrail.testing.launch import LaunchSuite
    from lightrail.testing.measurement import MeasurementSuite
    from lightrail.testing.model import ModelSuite
    from lightrail.testing.optimizer import OptimizerSuite
    from lightrail.testing.partition import PartitionSuite
    from lightrail.testing.privacy import PrivacySuite
    from lightrail.testing.sampler import SamplerSuite
    from lightrail.testing.sampler_wrapper import SamplerWrapperSuite
    from lightrail.testing.schedule import ScheduleSuite
    from lightrail.testing.search import SearchSuite
    from lightrail.testing.suite import NonConformance, NotApplicable, Outcome, Suite, examine
    from lightrail.testing.sweep import SweepSuite
    from lightrail.testing.task import TaskSuite
    from lightrail.testing.time_grid import TimeGridSuite
    from lightrail.testing.topology import TopologySuite
    from lightrail.testing.transform import TransformSuite

__all__ = [
    "BatchingSuite",
    "Case",
    "CompressorSuite",
    "DataSuite",
    "DenoiserSuite",
    "FederatedSuite",
    "GuidanceSuite",
    "LaunchSuite",
    "MeasurementSuite",
    "ModelSuite",
    "NonConformance",
    "NotApplicable",
    "OptimizerSuite",
    "Outcome",
    "PartitionSuite",
    "PrivacySuite",
    "SamplerSuite",
    "SamplerWrapperSuite",
    "ScheduleSuite",
    "SearchSuite",
    "Suite",
    "SweepSuite",
    "TaskSuite",
    "TimeGridSuite",
    "TopologySuite",
    "TransformSuite",
    "examine",
    "installed_cases",
]

_HOMES = {
    "TopologySuite": "topology",
    "PartitionSuite": "partition",
    "FederatedSuite": "federated",
    "CompressorSuite": "compressor",
    "Case": "installed",
    "DataSuite": "data",
    "DenoiserSuite": "denoiser",
    "GuidanceSuite": "guidance",
    "LaunchSuite": "launch",
    "MeasurementSuite": "measurement",
    "ModelSuite": "model",
    "NonConformance": "suite",
    "NotApplicable": "suite",
    "OptimizerSuite": "optimizer",
    "Outcome": "suite",
    "BatchingSuite": "batching",
    "PrivacySuite": "privacy",
    "SamplerSuite": "sampler",
    "SamplerWrapperSuite": "sampler_wrapper",
    "ScheduleSuite": "schedule",
    "SearchSuite": "search",
    "Suite": "suite",
    "SweepSuite": "sweep",
    "TaskSuite": "task",
    "TimeGridSuite": "time_grid",
    "TransformSuite": "transform",
    "examine": "suite",
    "installed_cases": "installed",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
