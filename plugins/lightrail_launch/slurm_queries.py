"""What SLURM's own commands say of its partitions and jobs, and how they are asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Nodes",
    "SlurmRefusal",
    "ask",
    "fields_of",
    "forgotten_job",
    "nodes_by_partition",
    "seconds_of",
    "shown_job",
]

_TIMES = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
# What a controller says that is restarted or has too much to do.
_PASSING = ("Unable to contact", "Socket timed out", "Resource temporarily unavailable", "Connection refused")


class SlurmRefusal(Exception):
    """A command of SLURM's failed; its text is what the command said."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition.

    Args:
        partition: Its name.
        is_default: Whether jobs that name no partition go there.
        limit: The longest time of a job there, in seconds; ``None`` for no limit.
        count: How many.
        processors: Of each.
        cards: Graphics cards of each.
    """

    partition: str
    is_default: bool
    limit: int | None
    count: int
    processors: int
    cards: int


def ask(*command: str, patience: float = 0.0) -> str:
    """What a command of SLURM's prints.

    Args:
        command: Its words.
        patience: For how many seconds a controller that does not answer is asked again.

    Raises:
        SlurmRefusal: It failed, or is not here.
    """
    until = time.monotonic() + patience
    while True:
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except FileNotFoundError as error:
            raise SlurmRefusal(f"there is no {command[0]} on this machine") from error
        except subprocess.TimeoutExpired as error:
            raise SlurmRefusal(f"{command[0]} did not answer within a minute") from error
        if answer.returncode == 0:
            return answer.stdout
        said = _said(answer.stderr) or f"{command[0]} ended with status {answer.returncode}"
        if time.monotonic() >= until or not any(each in said for each in _PASSING):
            raise SlurmRefusal(said)
        time.sleep(2)


def _said(text: str) -> str:
    """The message without the name of the program at the beginning of each line."""
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def fields_of(text: str) -> dict[str, str]:
    """The fields of what ``scontrol show job`` prints.

    Example:
        >>> fields_of("JobId=7 JobName=my run\\n   JobState=PENDING Comment=no such folder")
        {'JobId': '7', 'JobName': 'my run', 'JobState': 'PENDING', 'Comment': 'no such folder'}
    """
    found = re.findall(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", text, flags=re.DOTALL)
    return dict(found)


def shown_job(number: str, patience: float = 0.0) -> dict[str, str] | None:
    """What SLURM knows of a job; ``None`` where it knows it no more.

    Args:
        number: Of the job.
        patience: For how many seconds a controller that does not answer is asked again.

    Raises:
        SlurmRefusal: SLURM does not answer.
    """
    try:
        return fields_of(ask("scontrol", "show", "job", number, patience=patience))
    except SlurmRefusal as refusal:
        if "Invalid job id" in str(refusal):
            return None
        raise


def forgotten_job(number: str) -> dict[str, str] | None:
    """What the accounting, where there is one, says of a job that the controller has forgotten."""
    if shutil.which("sacct") is None:
        return None
    names = ("State", "ExitCode", "Comment")
    try:
        text = ask("sacct", "--noheader", "--parsable2", "-X", "-j", number, "--format", ",".join(names))
    except SlurmRefusal:
        return None
    lines = text.splitlines()
    if not lines:
        return None
    state, exit_code, comment = [*lines[-1].split("|", 2), "", ""][:3]
    # "CANCELLED by 1000"
    return {"JobState": state.split(" ")[0], "ExitCode": exit_code, "Comment": comment}


def nodes_by_partition() -> list[Nodes]:
    """Every kind of node of every partition.

    Raises:
        SlurmRefusal: SLURM does not answer.
    """
    found = []
    for line in ask("sinfo", "--noheader", "--format=%P|%l|%D|%c|%G").splitlines():
        partition, limit, count, processors, resources = line.strip().split("|")
        cards = sum(int(n) for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", resources))
        name = partition.rstrip("*")
        found.append(Nodes(name, name != partition, seconds_of(limit), int(count), int(processors.rstrip("+")), cards))
    return found


def seconds_of(limit: str) -> int | None:
    """A time limit as SLURM writes it, in seconds; ``None`` for no limit, or for what is no time.

    Example:
        >>> seconds_of("90"), seconds_of("1:30"), seconds_of("24:00:00"), seconds_of("1-12"), seconds_of("infinite")
        (5400, 90, 86400, 129600, None)
    """
    match = _TIMES.fullmatch(limit.strip())
    if match is None:
        return None
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        return int(match["days"]) * 86400 + _weighed(parts, (3600, 60, 1))
    return _weighed(parts, (60, 1) if len(parts) < 3 else (3600, 60, 1))


def _weighed(parts: Sequence[int], weights: Sequence[int]) -> int:
    return sum(part * weight for part, weight in zip(parts, weights, strict=False))
