"""The actors of runs on a Ray cluster: plain classes, which Ray makes actors of."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightrail.launch.job import outcome_of
from lightrail.launch.node import HELD

__all__ = ["Carrier", "Rank"]


class Carrier:
    """Starts a job's supervisor, and again when Ray had to start this actor again; it ends with the job.

    Args:
        folder: The run folder.
        command: The words that start the supervisor.
        directory: Where they are to be run.
        environment: What they need beside the environment of the cluster.
    """

    def __init__(self, folder: str, command: Sequence[str], directory: str, environment: Mapping[str, str]) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        self._folder, self._command, self._directory = Path(folder), list(command), directory
        # What the run starts in its turn is to be on this cluster, however many there are.
        cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        self._environment = {**os.environ, **environment, **cluster}
        self._process: subprocess.Popen[bytes] | None = None
        self._is_asked_to_stop = False
        threading.Thread(target=self._carry, daemon=True).start()

    def phase(self) -> tuple[str, str]:
        """The job's phase, and why."""
        return ("running", "") if self._process is not None else ("pending", "its process is being started")

    def stop(self) -> None:
        """Asks the run to save and stop."""
        self._is_asked_to_stop = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def _carry(self) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        status = HELD
        # Held: a run that outlived the actor before this one goes on to its end.
        while status == HELD and not self._is_asked_to_stop:
            with open(self._folder / "launch" / "output.log", "ab") as output:
                self._process = subprocess.Popen(
                    self._command, cwd=self._directory, env=self._environment, stdout=output, stderr=output
                )
            status = self._process.wait()
            if status == HELD and outcome_of(self._folder) is None:
                time.sleep(5)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class Rank:
    """One process of a run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> tuple[str, int]:
        """This machine's address, and a port that is free on it."""
        import ray  # pyright: ignore[reportMissingImports]

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, command: Sequence[str], directory: str, environment: Mapping[str, str], log: str) -> int:
        """Carries the rank out.

        Returns:
            Its exit status, or -N where signal N killed it.
        """
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                list(command),
                cwd=directory,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                # It must not go on alone beside the one that is started in its place.
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return self._process.wait()

    def stop(self) -> None:
        """Asks it to save and stop."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def _end_with_parent() -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
