"""torch's elastic agent around the processes of one run on this machine.

``python -m lightrail_launch.elastic_agent FOLDER --processes N`` starts them, and all of them again when one dies.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from lightrail.errors import LOST_RANK

__all__ = ["main"]


class _Agent(LocalElasticAgent):
    """One that does not repeat a mistake: only a process that was killed, or had lost another one, is started again."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        if result.state is WorkerState.FAILED:
            first = min(result.failures.values(), key=lambda failure: failure.timestamp)
            if first.exitcode >= 0 and first.exitcode != LOST_RANK:
                self._remaining_restarts = 0
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries the order in a folder out with several processes on this machine.

    Args:
        arguments: The words after the module's name; those of the process by default.

    Returns:
        The exit status: 0, that of the process that failed first, or 128 + N where signal N ended it.
    """
    parser = argparse.ArgumentParser(prog="python -m lightrail_launch.elastic_agent")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rendezvous", default=None)
    parser.add_argument("--restarts", type=int, default=2)
    options = parser.parse_args(arguments)
    patched: Any = api
    patched.LocalElasticAgent = _Agent
    words = ["-u", "-m", "lightrail.train", "--order", str(options.folder)]
    try:
        api.launch_agent(_configuration(options), sys.executable, words)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _configuration(options: argparse.Namespace) -> api.LaunchConfig:
    several = options.nodes > 1
    return api.LaunchConfig(
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        nproc_per_node=options.processes,
        # All machines of one run meet under its name.
        run_id=options.folder.name if several else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=options.rendezvous or "localhost:0",
        local_addr=None if several else "localhost",
        max_restarts=options.restarts,
        monitor_interval=0.5,
    )


if __name__ == "__main__":
    sys.exit(main())
