"""The batch script of a run, and what becomes of the job that it is submitted as."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightrail.launch import JobState, Order
from lightrail_launch.slurm_queries import SlurmRefusal

__all__ = ["state_of", "submitted_number"]

NOT_SHARED = "the run folder is not shared"
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_STOPPED = {
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "TIMEOUT": "its time was over before it had saved; a greater launch.grace gives it longer",
    "DEADLINE": "its deadline passed",
    "PREEMPTED": "preempted, on a cluster that does not queue such jobs again",
    "NODE_FAIL": "its node failed, on a cluster that does not queue such jobs again",
    "BOOT_FAIL": "its node did not boot",
}


def submitted_number(order: Order, options: Mapping[str, Any], *, name: str, setup: Sequence[str], command: str) -> str:
    """Submits an order.

    Args:
        order: What the job carries out.
        options: Options of ``sbatch`` by their long names.
        name: Of the job.
        setup: Lines of shell before the run.
        command: What carries it out, as one line of shell.

    Returns:
        The number of the job.

    Raises:
        SlurmRefusal: ``sbatch`` refused it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    folder = order.workspace / "slurm"
    folder.mkdir(exist_ok=True)
    executor = SlurmExecutor(folder)
    executor.update_parameters(
        job_name=name,
        nodes=options["nodes"],
        # The cluster's own limit holds where none is said, and no name of submitit's in the accounts.
        time=None,
        wckey=None,
        stderr_to_stdout=True,
        use_srun=False,
        setup=[*_probe(order), *setup, "export PYTHONUNBUFFERED=1"],
        additional_parameters=dict(options),
    )
    try:
        # What sbatch says against it is told once, in the error.
        with contextlib.redirect_stderr(io.StringIO()):
            return executor._submit_command(f"exec {command}").job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmRefusal(str(error).replace("sbatch: error: ", "").strip()) from error


def _probe(order: Order) -> list[str]:
    """Lines of shell that end the job, with the reason in its comment, where a node lacks what the run needs."""
    needed = (
        ("-r", order.path, f"{NOT_SHARED}: {order.path} is not there"),
        ("-x", Path(sys.executable), f"the environment is not shared: {sys.executable} is not there"),
        ("-d", order.directory, f"the working directory is not shared: {order.directory} is not there"),
    )
    where = "on ${SLURMD_NODENAME:-$(hostname)}"
    tests = "; ".join(
        f"[ {flag} {shlex.quote(str(path))} ] || {{ echo {shlex.quote(missing)} {where}; exit 1; }}"
        for flag, path, missing in needed
    )
    one_each = 'srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --mpi=none --chdir=/'
    return [
        f"probe={shlex.quote(tests)}",
        'missing=$(sh -c "$probe")',
        'if [ -z "$missing" ] && [ "$SLURM_NNODES" != 1 ]; then',
        f'    missing=$({one_each} --input=none sh -c "$probe" 2>/dev/null | head -n 1)',
        "fi",
        'if [ -n "$missing" ]; then',
        '    echo "$missing" >&2',
        '    scontrol update JobId="$SLURM_JOB_ID" Comment="$missing"',
        "    exit 1",
        "fi",
    ]


def state_of(shown: Mapping[str, str] | None, *, is_cancelled: bool) -> JobState:
    """How a job fares, from what SLURM says of it.

    Args:
        shown: The fields that SLURM shows; ``None`` where it has forgotten the job.
        is_cancelled: Whether its user asked that it stop.

    Example:
        >>> state_of({"JobState": "PENDING", "Reason": "Resources"}, is_cancelled=False)
        JobState(phase='pending', reason='waits for Resources')
    """
    if shown is None:
        return JobState("stopped", "cancelled") if is_cancelled else JobState("lost", "SLURM knows it no more")
    state, reason = shown.get("JobState", ""), shown.get("Reason", "None")
    if state in _WAITING:
        held = "; release it with scontrol release" if "held" in reason.lower() else ""
        return JobState("pending", "" if reason == "None" else f"waits for {reason}{held}")
    if state in _RUNNING:
        return JobState("running")
    if is_cancelled:
        return JobState("stopped", "cancelled")
    if state in _STOPPED:
        return JobState("stopped", _STOPPED[state])
    return _failed(state, shown)


def _failed(state: str, shown: Mapping[str, str]) -> JobState:
    comment, exit_code = shown.get("Comment", ""), shown.get("ExitCode", "")
    if comment not in ("", "(null)"):
        return JobState("failed", comment)
    if exit_code == "0:53":
        where = shown.get("BatchHost", "the node")
        return JobState("failed", f"{NOT_SHARED}: the log could not be written on {where}")
    if state == "OUT_OF_MEMORY":
        return JobState("failed", "out of memory; launch.mem asks for more")
    return JobState("lost" if state == "COMPLETED" else "failed", f"it ended as {state} {exit_code} and left no word")
