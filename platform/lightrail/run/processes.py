"""The processes of one run, where something else than the run itself started them: torchrun, mpirun, srun."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightrail.errors import ConfigurationError

__all__ = [
    "Processes",
    "fitted_trainer",
    "is_first_rank",
    "plain_trainer",
    "refuse_many",
    "started_processes",
    "take_rank",
]

# rank, how many, rank on this machine, how many on this machine
_STARTERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
}


@dataclass(frozen=True)
class Processes:
    """How this process stands among those that were started together.

    Args:
        rank: Its number among all, from 0.
        count: How many there are.
        local_rank: Its number on this machine, from 0.
        local_count: How many there are on this machine.
        starter: Who started them, in one word.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    starter: str

    @property
    def nodes(self) -> int:
        """On how many machines."""
        return self.count // self.local_count

    @property
    def node(self) -> int:
        """The number of this machine, from 0."""
        return self.rank // self.local_count


def started_processes(environment: Mapping[str, str] | None = None) -> Processes | None:
    """How many processes were started together for this run, as the environment says.

    Args:
        environment: That of this process by default.

    Returns:
        This one among them; ``None`` where it was started alone, or by Lightning.

    Raises:
        ConfigurationError: What the environment says cannot be.

    Example:
        >>> started_processes({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
        Processes(rank=3, count=4, local_rank=1, local_count=2, starter='torchrun')
    """
    environment = os.environ if environment is None else environment
    for starter, (rank, count, local_rank, local_count) in _STARTERS.items():
        if rank in environment and count in environment and not _is_sruns(starter, environment):
            size = _number(environment, count)
            alone = local_rank not in environment
            found = Processes(
                _number(environment, rank),
                size,
                0 if alone else _number(environment, local_rank),
                _number(environment, local_count) if local_count in environment else 1 if alone else size,
                _named(starter, environment),
            )
            return _checked(found)
    return _started_by_slurm(environment)


def _is_sruns(starter: str, environment: Mapping[str, str]) -> bool:
    """Whether what looks like MPICH's mpiexec is srun, which speaks its protocol, but without the local ranks."""
    return starter == "mpiexec" and environment.get("PMI_SIZE") == environment.get("SLURM_STEP_NUM_TASKS", "")


def _named(starter: str, environment: Mapping[str, str]) -> str:
    """Who really set the variables: those of torchrun are what the others are translated into."""
    if starter != "torchrun" or "TORCHELASTIC_RUN_ID" in environment:
        return starter
    others = (
        name
        for name, variables in _STARTERS.items()
        if name != starter and variables[1] in environment and not _is_sruns(name, environment)
    )
    return next(others, "srun" if "SLURM_STEP_ID" in environment else starter)


def _started_by_slurm(environment: Mapping[str, str]) -> Processes | None:
    # A batch script and an interactive shell have the variables of the job, but are no step of several tasks.
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        if "PMIX_RANK" in environment:
            raise _unknown_count()
        return None
    count = _number(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    tasks = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", str(count)))
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    found = Processes(
        _number(environment, "SLURM_PROCID"),
        count,
        _number(environment, "SLURM_LOCALID"),
        tasks[min(node, len(tasks) - 1)],
        "srun",
    )
    return _checked(found)


def _tasks(text: str) -> list[int]:
    """SLURM's short form, such as ``2(x3),1``, one number a node."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            "the variables that say which process this is are not whole numbers",
            found=f"{name}={environment.get(name, '')!r}",
            allowed="what torchrun, mpirun and srun set",
            remedy=f"Leave {name} to what starts the processes, or unset it for a process alone.",
        ) from error


def _unknown_count() -> ConfigurationError:
    return ConfigurationError(
        "this process is one of several, and nothing says of how many",
        found="PMIX_RANK, without a number of processes",
        allowed="the variables of torchrun, of Open MPI, of MPICH's mpiexec or of srun",
        remedy="Start the processes with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for each.",
    )


def _checked(found: Processes) -> Processes | None:
    if not 0 <= found.rank < found.count or not 0 <= found.local_rank < found.local_count <= found.count:
        raise ConfigurationError(
            f"the ranks that {found.starter} gave cannot be",
            found=_placed(found),
            allowed="ranks from 0, below the number of processes",
            remedy="Leave the variables to what starts the processes; unset those that an outer program left.",
        )
    if found.count % found.local_count or found.rank != found.node * found.local_count + found.local_rank:
        raise ConfigurationError(
            "the processes are not spread evenly, node by node",
            found=_placed(found),
            allowed="the same number on each machine, and neighbouring ranks on one",
            remedy="Start as many on each: mpirun --map-by ppr:N:node, srun --ntasks-per-node=N --distribution=block.",
        )
    return found if found.count > 1 or found.starter == "torchrun" else None


def _placed(found: Processes) -> str:
    return f"rank {found.rank} of {found.count}, on its machine {found.local_rank} of {found.local_count}"


def take_rank(processes: Processes | None, environment: MutableMapping[str, str] | None = None) -> None:
    """Says in torchrun's variables, which torch and Lightning read, which process this is.

    Args:
        processes: This one among those that were started together.
        environment: That of this process by default.
    """
    if processes is None:
        return
    environment = os.environ if environment is None else environment
    values = (processes.rank, processes.count, processes.local_rank, processes.local_count)
    environment.update({name: str(value) for name, value in zip(_STARTERS["torchrun"], values, strict=True)})
    environment.update(GROUP_RANK=str(processes.node))
    if "lightning.fabric" in sys.modules:
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = processes.rank  # which was set when Lightning was imported


def is_first_rank() -> bool:
    """Whether this process speaks for the run: it is alone, or rank 0 of those that somebody started."""
    names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def refuse_many(what: str) -> None:
    """Refuses what one process has to do where several were started for it.

    Args:
        what: What it is, as it is typed.

    Raises:
        ConfigurationError: There are several.
    """
    processes = started_processes()
    if processes is not None and processes.count > 1:
        raise ConfigurationError(
            f"`{what}` starts processes of its own, and each of those started here would do so",
            found=f"{processes.count} processes by {processes.starter}",
            allowed="one process",
            remedy=f"Leave {processes.starter} out; launch=NAME starts the processes of each run.",
        )


def fitted_trainer(
    trainer: Mapping[str, Any], typed: Sequence[str], processes: Processes | None
) -> tuple[dict[str, Any], list[str]]:
    """The ``trainer`` group, fitted to the processes that were started where the user left it open.

    Args:
        trainer: The group.
        typed: The overrides, so that a default can be told from what the user asked for.
        processes: Those that were started together.

    Returns:
        The fitted group, and what was decided for the user, one sentence each.

    Raises:
        ConfigurationError: The group asks for other processes than there are.

    Example:
        >>> two = Processes(0, 2, 0, 2, "mpirun")
        >>> fitted_trainer({"devices": 1, "strategy": "auto"}, [], two)[0]
        {'devices': 2, 'strategy': 'ddp', 'num_nodes': 1}
    """
    if processes is None:
        return dict(trainer), []
    asked = {override.lstrip("+").partition("=")[0] for override in typed}
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes")
    left_open = devices in ("auto", -1, "-1") or (str(devices) == "1" and "trainer.devices" not in asked)
    if not left_open and _how_many(devices) != processes.local_count:
        raise _contradiction("devices", devices, processes.local_count, processes)
    if nodes not in (None, processes.nodes) and (nodes != 1 or "trainer.num_nodes" in asked):
        raise _contradiction("num_nodes", nodes, processes.nodes, processes)
    if processes.count == 1:
        return dict(trainer), []
    strategy = str(trainer.get("strategy") or "auto")
    if any(word in strategy for word in ("spawn", "fork", "notebook")):
        raise _contradiction("strategy", strategy, "ddp, fsdp or auto", processes)
    fitted: dict[str, Any] = {
        "devices": processes.local_count if left_open else devices,
        "strategy": "ddp" if strategy == "auto" else trainer["strategy"],
        "num_nodes": processes.nodes,
    }
    said = " ".join(f"trainer.{key}={value}" for key, value in fitted.items() if trainer.get(key, 1) != value)
    notes = [f"{processes.count} processes by {processes.starter}: {said}"] if said else []
    return {**trainer, **fitted}, notes


def plain_trainer(group: Any) -> dict[str, Any]:
    """The ``trainer`` group of a configuration as plain values."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(group, resolve=True)
    return plain


def _how_many(devices: Any) -> int:
    if isinstance(devices, str) and "," in devices:
        return len([each for each in devices.split(",") if each.strip()])
    return len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else int(devices)


def _contradiction(key: str, found: Any, allowed: Any, processes: Processes) -> ConfigurationError:
    machines = f" on each of {processes.nodes} machines" if processes.nodes > 1 else ""
    return ConfigurationError(
        f"trainer.{key} contradicts the processes that {processes.starter} started",
        found=f"trainer.{key}={found}, with {processes.local_count} processes{machines}",
        allowed=f"trainer.{key}={allowed}",
        remedy=f"Leave trainer.{key} out, or start the run without {processes.starter}.",
    )
