"""The ranks of a run meet before their process group is made, so that one that never comes can be named."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed import DistError, PrefixStore, TCPStore

from lightrail.errors import ConfigurationError, LostRank
from lightrail.run.heartbeats import Beat
from lightrail.run.lost_ranks import is_of_communication
from lightrail.run.meeting_place import forget_address, settle_address
from lightrail.run.processes import Processes

__all__ = ["Rendezvous", "cluster_environment"]


def cluster_environment(processes: Processes | None, timeout: float) -> ClusterEnvironment:
    """Where Lightning reads which rank this is; it would otherwise take a batch script for a step of several tasks.

    Args:
        processes: Those that were started together; ``None`` where Lightning starts them.
        timeout: How long to wait for what rank 0 says, in seconds.
    """
    if processes is None or processes.count == 1:
        return LightningEnvironment()
    settle_address(processes, timeout)
    return TorchElasticEnvironment()


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's own kills every process, its own too, when it sees a dead one: nobody could say which it was."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class Rendezvous:
    """Where the ranks of a trainer meet.

    Args:
        trainer: Not yet running.
        timeout: How long they wait for each other, there and in each operation, in seconds.
    """

    def __init__(self, trainer: Trainer, timeout: float) -> None:
        strategy: Any = trainer.strategy
        self._strategy = strategy
        self._timeout = timeout
        self._environment: ClusterEnvironment = strategy.cluster_environment
        self._parent = os.getppid()
        self._server: TCPStore | None = None
        self._arrived: dict[int, Beat] = {}
        self.count: int = trainer.world_size
        self.is_kept_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # NCCL ends the process when an operation takes too long; the watch has to come first.
        spare = 60 if strategy.root_device.type == "cuda" else 0
        if hasattr(strategy, "_timeout"):
            strategy._timeout = timedelta(seconds=timeout + spare)
        launcher = getattr(strategy, "_launcher", None)
        if type(launcher) is _SubprocessScriptLauncher:
            strategy._launcher = _Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self._set_up: Callable[[], None] = strategy.setup_environment
        strategy.setup_environment = self._meet_and_set_up
        if self.rank == 0 and "MASTER_PORT" in os.environ and not self._is_open():
            self._check_port()

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self._environment.node_rank() * self._strategy.num_processes + self._environment.local_rank()

    @property
    def children(self) -> Sequence[subprocess.Popen[bytes]]:
        """The ranks that this process started."""
        return getattr(self._strategy.launcher, "procs", [])

    def connect(self, prefix: str) -> PrefixStore:
        """A connection of its own to the store in which they met.

        Args:
            prefix: What the keys begin with.
        """
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        address, port = self._environment.main_address, self._environment.main_port
        wait = timedelta(seconds=self._timeout)
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
        return PrefixStore(f"lightrail/{attempt}/{prefix}", store)

    def end_children(self, patience: float = 15.0) -> None:
        """Sees to it that no rank that this process started outlives a run that has failed.

        Args:
            patience: How long they may take to end by themselves, in seconds.
        """
        end = time.monotonic() + patience
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)

    def lost_since(self, error: BaseException) -> LostRank | None:
        """Who was lost between the meeting and the first word of each, if that is what an error means."""
        if not self._arrived or not is_of_communication(error):
            return None
        reason = str(error).splitlines()[0]
        dead = {
            rank: f"it came, and its process is gone ({reason})" for rank, beat in self._arrived.items() if beat.is_dead
        }
        others = {rank: f"it came, and does not answer ({reason})" for rank in self._arrived if rank != self.rank}
        return self._never_came(dead or others, self._arrived)

    @staticmethod
    def _is_open() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    def _check_port(self) -> None:
        if self.is_kept_elsewhere:
            return
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", self._environment.main_port))
        except OSError as error:
            raise self._port_is_taken(error) from error

    def _port_is_taken(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"port {self._environment.main_port} is not free, and the ranks were to meet there",
            found=f"MASTER_PORT={self._environment.main_port}: {str(error).splitlines()[0]}",
            allowed="a port that no other program of rank 0's machine uses",
            remedy="Set MASTER_PORT to another one; on one machine unset it, and a free one is found.",
        )

    def _meet_and_set_up(self) -> None:
        if not self._is_open():
            self._meet()
        self._set_up()

    def _meet(self) -> None:
        end = time.monotonic() + self._timeout
        if self.rank == 0 and not self.is_kept_elsewhere:
            wait = timedelta(seconds=self._timeout)
            address, port = self._environment.main_address, self._environment.main_port
            try:
                # Of several tenants, since the process group will meet at the same port.
                self._server = TCPStore(
                    address, port, is_master=True, wait_for_workers=False, multi_tenant=True, timeout=wait
                )
            except DistError as error:
                raise self._port_is_taken(error) from error
        else:
            self._await_server(end)
        try:
            store = self.connect("arrived")
            store.set(str(self.rank), Beat.of_this_process(0).text())
            self._await_all(store, end)
        except DistError as error:
            raise self._never_came({0: f"its connection is closed ({str(error).splitlines()[0]})"}, {}) from error
        forget_address()

    def _await_server(self, end: float) -> None:
        place = (self._environment.main_address, self._environment.main_port)
        while True:
            try:
                with socket.create_connection(place, timeout=2):
                    return
            except OSError as error:
                if os.getppid() != self._parent:
                    raise self._never_came({0: "what started this rank is gone"}, {}) from error
                if time.monotonic() > end:
                    reason = f"nobody answers at {place[0]}:{place[1]} ({error})"
                    raise self._never_came({0: reason}, {}) from error
                time.sleep(0.1)

    def _await_all(self, store: PrefixStore, end: float) -> None:
        keys = [str(rank) for rank in range(self.count)]
        while not store.check(keys):
            arrived = {rank: Beat.read(store.get(str(rank))) for rank in range(self.count) if store.check([str(rank)])}
            lost = {rank: "it came, and its process is gone" for rank, beat in arrived.items() if beat.is_dead}
            lost |= {
                rank: f"it ended with status {child.poll()} before it came"
                for rank, child in enumerate(self.children, self.rank + 1)
                if child.poll() is not None
            }
            if time.monotonic() > end:
                lost |= {rank: "it never came" for rank in range(self.count) if rank not in arrived}
            if lost:
                raise self._never_came(lost, arrived)
            time.sleep(0.1)
        self._arrived = {rank: Beat.read(store.get(key)) for rank, key in enumerate(keys)}

    def _never_came(self, lost: dict[int, str], arrived: dict[int, Beat]) -> LostRank:
        each = self._strategy.num_processes
        hosts = {rank // each: beat.host for rank, beat in arrived.items()}
        hosts.setdefault(self.rank // each, socket.gethostname())
        found = []
        for rank, reason in lost.items():
            machine = hosts.get(rank // each, f"machine number {rank // each}")
            found.append(f"rank {rank} (local rank {rank % each} on {machine}): {reason}")
        names = ", ".join(map(str, lost))
        return LostRank(
            f"rank {names} did not come" if len(lost) == 1 else f"ranks {names} did not come",
            found="\n".join(found),
            allowed=f"{self.count} ranks at {self._environment.main_address}:{self._environment.main_port} "
            f"within run.rank_timeout={self._timeout:g} s",
            remedy="Look at what that rank printed, and whether its machine reaches that address and port; "
            "raise run.rank_timeout where machines start at different times.",
        )
