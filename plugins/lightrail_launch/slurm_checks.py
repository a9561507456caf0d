"""What a SLURM cluster could never start is refused before anything is written."""

from __future__ import annotations

import getpass
import importlib.util
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightrail.errors import CompositionError, ConfigurationError, PluginError, UserError, closest
from lightrail_launch.slurm_queries import Nodes, SlurmRefusal, ask, nodes_by_partition, seconds_of

if TYPE_CHECKING:
    from lightrail_launch.slurm import Slurm

__all__ = ["check_cluster", "check_programs", "refused"]


def check_programs() -> None:
    """Checks that jobs can be submitted from this machine.

    Raises:
        PluginError: ``sbatch`` or submitit is not here.
    """
    absent = [each for each in ("sbatch", "scontrol", "sinfo") if shutil.which(each) is None]
    if absent:
        raise PluginError(
            "SLURM is not on this machine",
            found=f"no {', '.join(absent)} on the PATH",
            allowed="a machine from which jobs are submitted, such as a cluster's login node",
            remedy="Start train there, or leave launch=slurm out to run it here.",
        )
    if importlib.util.find_spec("submitit") is None:
        raise PluginError(
            "launch 'slurm' needs a package that is not installed",
            found="no module submitit",
            allowed="lightrail with its extra slurm",
            remedy="pip install 'lightrail[slurm]'",
        )


def check_cluster(launch: Slurm, options: Mapping[str, Any], processes: int) -> None:
    """Checks that the cluster has what a launch asks for.

    Args:
        launch: The launch.
        options: Its options of ``sbatch``.
        processes: On each node.

    Raises:
        UserError: It has not, or SLURM does not answer.
    """
    try:
        everything = nodes_by_partition()
    except SlurmRefusal as refusal:
        raise CompositionError(
            "SLURM does not answer",
            found=str(refusal),
            allowed="a cluster whose controller answers sinfo",
            remedy="Try again later; where SLURM_CONF is set, see that it names the right cluster.",
        ) from refusal
    nodes = _of_partition(launch.partition, everything)
    if nodes and "nodelist" not in launch.extra and "clusters" not in launch.extra:
        _check_size(launch, nodes, processes)
        _check_time(launch, nodes)
    _try_out(options)


def _of_partition(partition: str | None, everything: list[Nodes]) -> list[Nodes]:
    """The nodes of the partitions that are named; those of the default where none is."""
    names = sorted({each.partition for each in everything})
    if partition is None:
        return [each for each in everything if each.is_default]
    for name in partition.split(","):
        if name not in names:
            raise ConfigurationError(
                f"the cluster has no partition '{name}'",
                found=f"launch.partition={partition}",
                allowed=", ".join(names),
                remedy=f"{closest(name, names)}Choose one of these.",
            )
    return [each for each in everything if each.partition in partition.split(",")]


def _check_size(launch: Slurm, nodes: list[Nodes], processes: int) -> None:
    processors, cards = processes * (launch.cpus_per_process or 1), launch.gpus_per_node or 0
    fitting: dict[str, int] = {}
    for each in nodes:
        fits = each.processors >= processors and each.cards >= cards
        fitting[each.partition] = fitting.get(each.partition, 0) + (each.count if fits else 0)
    if launch.nodes <= max(fitting.values()):
        return
    raise ConfigurationError(
        f"partition {', '.join(fitting)} has too few nodes for this launch",
        found=f"{launch.nodes} nodes, each with {processors} processors and {cards} graphics cards"
        f" (processes_per_node={processes}, cpus_per_process={launch.cpus_per_process or 1})",
        allowed="; ".join(
            f"{each.count} nodes of {each.processors} processors and {each.cards} graphics cards" for each in nodes
        ),
        remedy="Lower launch.nodes, launch.processes_per_node, launch.cpus_per_process or launch.gpus_per_node, "
        "or choose another launch.partition.",
    )


def _check_time(launch: Slurm, nodes: list[Nodes]) -> None:
    wanted = None if launch.time is None else seconds_of(launch.time)
    limits = [each.limit for each in nodes]
    if wanted is None or any(limit is None or wanted <= limit for limit in limits):
        return
    longest = max(limit for limit in limits if limit is not None)
    raise ConfigurationError(
        "time is longer than any job of the partition may take",
        found=f"launch.time={launch.time}",
        allowed=f"at most {longest // 3600}:{longest // 60 % 60:02}:{longest % 60:02} in {nodes[0].partition}",
        remedy="Lower launch.time: the run saves when its time is over, and goes on in the next job.",
    )


def _try_out(options: Mapping[str, Any]) -> None:
    """Lets sbatch look at the options without submitting anything: it alone knows accounts, limits and licences."""
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    try:
        ask("sbatch", "--test-only", "--output=/dev/null", *words, "--wrap=true")
    except SlurmRefusal as refusal:
        # Nodes that are down today come back while the job waits.
        if "down, drained or reserved" not in str(refusal):
            raise refused(str(refusal), options) from refusal


def refused(said: str, options: Mapping[str, Any]) -> UserError:
    """The error for what ``sbatch`` refused.

    Args:
        said: What it said.
        options: What it was asked for.
    """
    said = said.removeprefix("allocation failure: ").removeprefix("Batch job submission failed: ")
    found = ", ".join(f"{name}={value}" for name, value in options.items())
    if "account" in said.lower():
        return ConfigurationError(
            f"SLURM refuses the account: {said}",
            found=f"launch.account={options.get('account', 'none said')}",
            allowed=_accounts(),
            remedy="Name an account that you may charge with launch.account=NAME.",
        )
    return ConfigurationError(
        f"SLURM refuses the job: {said}",
        found=found,
        allowed="what this cluster's sbatch accepts",
        remedy="Change the launch.* option that it names; `sinfo` and `sacctmgr show qos` say what there is.",
    )


def _accounts() -> str:
    try:
        told = ask(
            "sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={getpass.getuser()}", "format=account"
        )
    except SlurmRefusal:
        return "an account of yours; this cluster does not tell which"
    return ", ".join(sorted(set(told.split()))) or "none: you have no account on this cluster"
