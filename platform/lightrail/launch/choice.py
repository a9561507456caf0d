"""The launch that a configuration chooses, or that started a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightrail.launch.launch import Launch

if TYPE_CHECKING:
    from lightrail.configuration import Composition
    from lightrail.launch.job import Job

__all__ = ["chosen_launch", "launch_of"]


def chosen_launch(composition: Composition) -> Launch | None:
    """The launch that a composition chooses, made with its options; ``None`` for none.

    Args:
        composition: What was composed.

    Raises:
        UserError: It cannot be made: an extra is missing, or an option is out of its range.
    """
    from lightrail.catalogue.target import import_target
    from lightrail.run.build import call, options_of

    chosen = next((each for each in composition.chosen if each.kind == "launch"), None)
    if chosen is None:
        return None
    if chosen.plugin is not None:
        chosen.plugin.check_extras()
    target = import_target(chosen.target)
    options = options_of(target, chosen, {})
    return _known_as(call(target, chosen, options), chosen.name, options)


def _known_as(launch: Launch, name: str, options: Mapping[str, Any]) -> Launch:
    launch.name, launch.options = name, dict(options)
    return launch


def launch_of(job: Job) -> Launch:
    """The launch that started a job.

    Raises:
        PluginError: It is not installed here.
    """
    from lightrail.catalogue import load
    from lightrail.catalogue.target import import_target

    is_target = "." in job.launch and ":" not in job.launch
    made = import_target(job.launch) if is_target else load("launch", job.launch)
    return _known_as(made(**job.options), job.launch, job.options)
