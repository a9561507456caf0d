"""On a cluster that SLURM manages."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightrail import Launch
from lightrail.errors import ConfigurationError
from lightrail.launch import Job, JobState, Order
from lightrail.launch.job import write_outcome
from lightrail.options import at_least, positive
from lightrail_launch.slurm_checks import check_cluster, check_programs, refused
from lightrail_launch.slurm_job import CANCELLED, DEATHS
from lightrail_launch.slurm_queries import SlurmRefusal, ask, forgotten_job, seconds_of, shown_job
from lightrail_launch.slurm_script import state_of, submitted_number

__all__ = ["Slurm"]

# What the batch script itself relies on.
_OWN = (
    "output",
    "error",
    "open-mode",
    "signal",
    "requeue",
    "no-requeue",
    "chdir",
    "array",
    "wrap",
    "parsable",
    "test-only",
)


class Slurm(Launch):
    """Puts runs into the queue of a SLURM cluster and returns at once; what is preempted goes on by itself.

    Each process is a task of ``srun``. A job that is preempted, or whose time runs out, saves at the next batch
    boundary and goes back into the queue; so does one whose node fails. A run that is killed is started again within
    its job. The run folder has to lie on a disk that the nodes share.

    Args:
        nodes: Machines, at least 1.
        processes_per_node: Processes on each, at least 1; as many as graphics cards where those are asked for, else as
            many as ``trainer.devices``, by default.
        gpus_per_node: Graphics cards on each, at least 0.
        cpus_per_process: Processors for each process, at least 1.
        mem: Memory of each node, as SLURM writes it: ``64G``.
        time: The limit, as SLURM writes it (``24:00:00``, ``2-12``), or in minutes; that of the partition by default.
            The run may be longer: it goes on in the next job.
        partition: Which part of the cluster.
        account: Who is charged.
        qos: The quality of service.
        constraint: Features that nodes must have.
        name: The name in the queue; that of the run folder by default.
        setup: Lines of shell before the run, such as ``module load cuda``.
        extra: Any other option of ``sbatch`` by its long name, such as ``{exclude: n7}``.
        grace: Seconds before the end of its time at which the run is asked to save, above 0.
        parallel: Jobs of a sweep at a time, at least 1; ``None`` for as many as there are.
        restarts: How often a run that died without making progress is started again, at least 0.

    Example:
        >>> Slurm(nodes=4, gpus_per_node=8, time="24:00:00").processes({"devices": 1})
        8
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        processes_per_node: int | None = None,
        gpus_per_node: int | None = None,
        cpus_per_process: int | None = None,
        mem: str | None = None,
        time: str | int | None = None,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        name: str | None = None,
        setup: Sequence[str] | None = None,
        extra: Mapping[str, Any] | None = None,
        grace: int = 120,
        parallel: int | None = None,
        restarts: int = 2,
    ) -> None:
        super().__init__(parallel=parallel, restarts=restarts)
        at_least(1, nodes=nodes)
        for option, count in (("processes_per_node", processes_per_node), ("cpus_per_process", cpus_per_process)):
            if count is not None:
                at_least(1, **{option: count})
        if gpus_per_node is not None:
            at_least(0, gpus_per_node=gpus_per_node)
        positive(grace=grace)
        self.nodes, self.processes_per_node = nodes, processes_per_node
        self.gpus_per_node, self.cpus_per_process = gpus_per_node, cpus_per_process
        self.time, self.partition, self.grace = _checked_time(time, grace), partition, grace
        self.job_name, self.setup = name, list(setup or ())
        self.extra = _checked_extra(extra)
        self.asked = {"mem": mem, "account": account, "qos": qos, "constraint": constraint}

    def processes(self, trainer: Mapping[str, object]) -> int:
        """Processes on each node.

        Args:
            trainer: The ``trainer`` group of the configuration.
        """
        devices = trainer.get("devices")
        of_trainer = devices if isinstance(devices, int) and devices > 1 else 1
        return self.processes_per_node or self.gpus_per_node or of_trainer

    def sbatch_options(self, trainer: Mapping[str, object]) -> dict[str, Any]:
        """The options of ``sbatch`` by their long names, as far as they do not depend on the run folder.

        Args:
            trainer: The ``trainer`` group of the configuration.
        """
        options = {
            "nodes": self.nodes,
            "ntasks-per-node": self.processes(trainer),
            "cpus-per-task": self.cpus_per_process,
            "gpus-per-node": self.gpus_per_node or None,
            "time": self.time,
            "partition": self.partition,
            **self.asked,
            "signal": f"B:USR1@{self.grace}",
            **self.extra,
        }
        return {name: value for name, value in options.items() if value is not None}

    def check(self, trainer: dict[str, object]) -> None:
        """Refuses what this cluster could never start; see :meth:`lightrail.Launch.check`."""
        check_programs()
        self._check_trainer(trainer)
        check_cluster(self, self.sbatch_options(trainer), self.processes(trainer))

    def _check_trainer(self, trainer: Mapping[str, object]) -> None:
        here = {"num_nodes": self.nodes, "devices": self.processes(trainer)}
        for key, launched in here.items():
            wanted = trainer.get(key, 1)
            if isinstance(wanted, int) and wanted not in (1, -1, launched):
                raise ConfigurationError(
                    f"the launch and the trainer do not agree on trainer.{key}",
                    found=f"trainer.{key}={wanted}; launch: {self.nodes} nodes with {here['devices']} processes each",
                    allowed=f"trainer.{key}={launched}, or nothing said of it",
                    remedy="Leave the trainer's out: what the launch starts is what it uses.",
                )

    def start(self, order: Order) -> Job:
        """Submits the order's batch script; what the job prints goes to ``launch/output.log``."""
        check_programs()
        for left in (CANCELLED, DEATHS):
            (order.workspace / left).unlink(missing_ok=True)
        log = order.workspace / "output.log"
        options = {**self.sbatch_options(order.trainer), "output": str(log).replace("%", "%%"), "requeue": True}
        options |= {"chdir": str(order.directory)}
        name = self.job_name or order.folder.name
        try:
            number = submitted_number(order, options, name=name, setup=self.setup, command=self._command(order))
        except SlurmRefusal as refusal:
            raise refused(str(refusal), options) from refusal
        return self.job(order, number, log=str(log))

    def _command(self, order: Order) -> str:
        words = [
            sys.executable,
            "-m",
            "lightrail_launch.slurm_job",
            str(order.folder),
            "--restarts",
            str(self.restarts),
        ]
        return shlex.join(words)

    def state(self, job: Job) -> JobState:
        """What SLURM says of it; its accounting, where the controller has forgotten it."""
        if shutil.which("scontrol") is None:
            return JobState("pending", "nobody knows: there is no scontrol on this machine to ask")
        try:
            shown = shown_job(job.number) or forgotten_job(job.number)
        except SlurmRefusal as refusal:
            return JobState("pending", f"nobody knows: {refusal}")
        return state_of(shown, is_cancelled=self._mark(job).exists())

    def cancel(self, job: Job) -> None:
        """Asks it to stop; the second time it is ended at once."""
        if self.state(job).is_over or job.outcome() is not None:
            return
        is_second = self._mark(job).exists()
        self._mark(job).touch()
        if is_second:
            ask("scancel", job.number)
            return
        ask("scancel", "--state=PENDING", job.number)
        state = self.state(job)
        if state.phase == "stopped":
            write_outcome(job.folder, state)
        elif not state.is_over:
            # The batch script alone: it hands that on, and knows by the mark that the job is not to be queued again.
            ask("scancel", "--batch", "--signal=USR1", job.number)

    @staticmethod
    def _mark(job: Job) -> Path:
        return job.folder / "launch" / CANCELLED


def _checked_time(time: str | int | None, grace: int) -> str | None:
    if time is None:
        return None
    seconds = seconds_of(str(time))
    is_unlimited = str(time).lower() in ("infinite", "unlimited")
    if is_unlimited or (seconds is not None and seconds > grace):
        return str(time)
    raise ConfigurationError(
        "time is no limit that SLURM knows" if seconds is None else "time leaves nothing before the grace",
        found=f"time={time}" + ("" if seconds is None else f", which is {seconds} s, and grace={grace} s"),
        allowed="minutes, MM:SS, HH:MM:SS, DAYS-HOURS or DAYS-HH:MM:SS, longer than grace",
        remedy="Write time as in launch.time=24:00:00, or lower launch.grace.",
    )


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    options = {name.lstrip("-").replace("_", "-"): value for name, value in (extra or {}).items()}
    own = [name for name in options if name in _OWN]
    if own:
        raise ConfigurationError(
            f"extra has an option of sbatch that lightrail sets itself: {own[0]}",
            found=f"extra.{own[0]}={options[own[0]]}",
            allowed="any long option of sbatch but " + ", ".join(_OWN),
            remedy="Leave it out; launch.grace says when a run is asked to save.",
        )
    return options
