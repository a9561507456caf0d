"""One rank of a run under SLURM: ``python -m lightrail_launch.slurm_task FOLDER``, a task of ``srun``.

What ``srun`` says in the end is one status for all ranks, and those that it killed since another died cannot be told
from that one. So each rank has somebody beside it who sees how it ends, and writes that down. Costs no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightrail.files import replace_file
from lightrail.launch.node import PASSED_ON
from lightrail.launch.order import Order, read_order

__all__ = ["End", "carry_out_rank", "ends_in", "main"]

ENDS = "ends"


@dataclass(frozen=True)
class End:
    """How one rank ended.

    Args:
        rank: Which one.
        host: Where.
        status: 0, its exit status, or -N where signal N killed it.
        asked: The signal that asked it to stop; ``None`` where none did.
        time: When, in seconds since 1970.
    """

    rank: int
    host: str
    status: int
    asked: int | None
    time: float

    @property
    def was_killed(self) -> bool:
        """Whether somebody killed it alone. SLURM would have killed who writes this, too."""
        return self.status < 0 and -self.status not in PASSED_ON


def ends_in(workspace: Path) -> list[End]:
    """What the ranks left, the first to end first."""
    written = [End(**json.loads(path.read_bytes())) for path in (workspace / ENDS).glob("[0-9]*.json")]
    return sorted(written, key=lambda end: end.time)


def carry_out_rank(order: Order) -> int:
    """Carries out one rank of an order, and writes down how that ended.

    Args:
        order: The order.

    Returns:
        Its exit status; 128 + N where signal N killed it.
    """
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    asked: list[int] = []
    for number in PASSED_ON:
        # SLURM signals every process of a step: the run gets its own.
        signal.signal(number, lambda number, _frame: asked.append(number))
    with ExitStack() as stack:
        lock = [stack.enter_context(open(order.workspace / "rank.lock", "a")).fileno()] if rank == 0 else []
        if lock and not _wait_for(lock[0], asked):
            status = 128 + asked[0]
        else:
            status = subprocess.Popen(order.rank_command, cwd=order.directory, pass_fds=lock).wait()
        end = End(rank, socket.gethostname(), status, asked[0] if asked else None, time.time())
        replace_file(order.workspace / ENDS / f"{rank}.json", json.dumps(asdict(end)).encode())
    return status if status >= 0 else 128 - status


def _wait_for(lock: int, asked: list[Any]) -> bool:
    """Waits until no rank of an earlier start lives: a node that SLURM gave up may go on for a while."""
    is_said = False
    while not asked:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not is_said:
                print("waiting for an earlier start of this run to end", file=sys.stderr, flush=True)
            is_said = True
            time.sleep(0.5)
        else:
            return True
    return False


def main() -> int:
    """Carries out this rank of the order in the folder that is named."""
    from lightrail.command import reporting_errors

    with reporting_errors() as outcome:
        outcome.status = carry_out_rank(read_order(Path(sys.argv[1])))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
