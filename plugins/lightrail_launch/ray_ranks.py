"""The supervisor of a run whose processes are actors: ``python -m lightrail_launch.ray_ranks FOLDER CPU=1 …``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightrail.errors import LOST_RANK
from lightrail.launch.node import Supervisor
from lightrail_launch.ray_actors import Rank

__all__ = ["RaySupervisor", "main"]

# How long the others may take to end once one has failed, in seconds: they say which one it was.
_PATIENCE = 30.0


class RaySupervisor(Supervisor):
    """A supervisor whose run is several actors, placed close together.

    Args:
        folder: The run folder.
        processes: How many.
        resources: What each of them needs, by Ray's names.
        restarts: How often they are started again without having made progress.
    """

    def __init__(self, folder: Path, processes: int, resources: dict[str, float], restarts: int) -> None:
        super().__init__(folder, restarts)
        self._processes, self._resources = processes, resources

    def _death(self, status: int) -> str:
        return "one of the processes was lost" if status == -signal.SIGKILL else super()._death(status)

    def _start(self, lock: int) -> int:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
        from ray.util.placement_group import placement_group, remove_placement_group  # pyright: ignore[reportMissingImports]

        self._note_start()
        group = placement_group([self._resources] * self._processes, strategy="PACK")
        ranks: list[Any] = []
        try:
            while not group.wait(1):
                if self.asked_to_stop is not None:
                    return 128 + self.asked_to_stop
            ranks = [self._rank(ray, group, number) for number in range(self._processes)]
            return self._wait(ray, ranks)
        except RayError as error:
            print(f"{type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            return -signal.SIGKILL
        finally:
            for rank in ranks:
                ray.kill(rank)
            remove_placement_group(group)

    def _rank(self, ray: Any, group: Any, number: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # pyright: ignore[reportMissingImports]

        return (
            ray.remote(Rank)
            .options(
                num_cpus=self._resources.get("CPU", 0),
                num_gpus=self._resources.get("GPU", 0),
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            )
            .remote()
        )

    def _wait(self, ray: Any, ranks: Sequence[Any]) -> int:
        address, port = ray.get(ranks[0].place.remote())
        command, directory = self.order.rank_command, str(self.order.directory)
        log = str(self.order.workspace / "output.log")
        waiting = []
        for number, rank in enumerate(ranks):
            # Ray shows each actor its own graphics cards alone, so each is a machine to Lightning.
            place = {"RANK": number, "WORLD_SIZE": len(ranks), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            variables = {name: str(value) for name, value in place.items()}
            meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
            waiting.append(rank.run.remote(command, directory, {**variables, **meeting}, log))
        return self._first_failure(ray, ranks, waiting)

    def _first_failure(self, ray: Any, ranks: Sequence[Any], waiting: list[Any]) -> int:
        asked, failed, since = False, 0, 0.0
        while waiting:
            done, waiting = ray.wait(waiting, timeout=0.5)
            for each in done:
                status = ray.get(each)
                if status and not failed:
                    failed, since = status, time.monotonic()
            if self.asked_to_stop is not None and not asked:
                asked = True
                for rank in ranks:
                    rank.stop.remote()
            if failed and time.monotonic() - since > _PATIENCE:
                break
        return -signal.SIGKILL if failed == LOST_RANK else failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries the order in a folder out with actors of the cluster that this machine belongs to."""
    parser = argparse.ArgumentParser(prog="python -m lightrail_launch.ray_ranks")
    parser.add_argument("folder", type=Path)
    parser.add_argument("resources", nargs="+")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--restarts", type=int, default=2)
    options = parser.parse_args(arguments)
    from lightrail.command import reporting_errors
    from lightrail_launch.ray import connect

    resources = {name: float(amount) for name, _, amount in (each.partition("=") for each in options.resources)}
    with reporting_errors() as outcome:
        connect("auto")
        supervisor = RaySupervisor(options.folder, options.processes, resources, options.restarts)
        outcome.status = supervisor.carry_out()
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
