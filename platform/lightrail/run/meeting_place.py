"""The address at which the processes of one run meet, where whatever started them names none."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightrail.errors import ConfigurationError
from lightrail.files import replace_file
from lightrail.launch.liveness import birth_of, is_alive
from lightrail.run.processes import Processes

__all__ = ["forget_address", "settle_address"]

# What is the same for all processes of one start, and for no other start.
_STARTS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID")


def settle_address(processes: Processes, timeout: float) -> None:
    """Puts ``MASTER_ADDR`` and ``MASTER_PORT`` into the environment, where they are missing.

    Args:
        processes: Those that meet.
        timeout: How long to wait for what rank 0 says, in seconds.

    Raises:
        ConfigurationError: There are several machines, and nothing says which is the first; or rank 0 never came.
    """
    one_machine = processes.nodes == 1
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = "127.0.0.1" if one_machine else _first_machine(processes)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_agreed_port(processes, timeout) if one_machine else _derived_port())


def _first_machine(processes: Processes) -> str:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST")
    if nodes:
        return SLURMEnvironment.resolve_root_node_address(nodes)
    raise ConfigurationError(
        f"the run has processes on {processes.nodes} machines, and nothing says where they meet",
        found="no MASTER_ADDR in the environment",
        allowed="the name or address of the machine of rank 0",
        remedy="Hand it to every process: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 …",
    )


def _derived_port() -> int:
    """The same on every machine without a word: made of the job's number."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return 29500
    name = f"{job}.{os.environ.get('SLURM_STEP_ID', '')}"
    return 15000 + int(hashlib.sha256(name.encode()).hexdigest(), 16) % 15000


def _agreed_port(processes: Processes, timeout: float) -> int:
    """A port that rank 0 found free; the others of this machine read it from a file."""
    place = _place()
    if processes.rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        said = {"port": port, "process": os.getpid(), "born": birth_of(os.getpid())}
        replace_file(place, json.dumps(said).encode())
        return port
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        said = _read(place)
        # One that an earlier start left behind is of a process that is gone.
        if said is not None and is_alive(said["process"], said["born"]):
            return int(said["port"])
        time.sleep(0.05)
    raise ConfigurationError(
        "rank 0 never came",
        found=f"no word of it in {place} after {timeout:g} s",
        allowed="all processes of a run on one machine started together",
        remedy="Look at rank 0's output, or set MASTER_ADDR and MASTER_PORT for every process.",
    )


def _place() -> Path:
    start = [f"{name}={os.environ[name]}" for name in _STARTS if name in os.environ]
    key = "\n".join(start or [f"{os.getppid()} {birth_of(os.getppid())}"])
    owner = os.getuid() if hasattr(os, "getuid") else 0
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"lightrail-{owner}-{digest}.json"


def _read(place: Path) -> dict[str, Any] | None:
    try:
        if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
            return None
        return json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None


def forget_address(environment: Mapping[str, str] | None = None) -> None:
    """Removes what rank 0 left for the others, once they have met."""
    if (environment or os.environ).get("RANK") == "0":
        _place().unlink(missing_ok=True)
