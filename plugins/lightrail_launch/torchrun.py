"""Several processes on this machine, or on several, under torch's elastic launcher."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightrail.errors import CompositionError, ConfigurationError
from lightrail.launch import Job, Order
from lightrail.launch.liveness import birth_of
from lightrail.launch.node import Supervisor, signals_held_back
from lightrail.options import at_least, positive
from lightrail.run.processes import Processes, fitted_trainer
from lightrail_launch.here import Here

__all__ = ["ElasticSupervisor", "Torchrun", "main"]


class Torchrun(Here):
    """Carries a run out in several processes, each on a device of its own, under torch's elastic launcher.

    When one of them dies, all are started again and go on from the last checkpoint. A single run stays in the
    foreground: Ctrl-C lets it save and stop. Each job of a sweep runs in the background, on this machine alone. Several
    machines meet at ``rendezvous``: type the same command on each, with the same ``run.name`` on a shared disk.

    Args:
        processes: Processes on each machine, at least 1; ``None`` for one a graphics card, or one where there is none.
        nodes: Machines, at least 1.
        rendezvous: HOST:PORT of one of the machines, where all of them meet; needed for more than one.
        grace: How long the processes may take to save when they are asked to stop, in seconds, above 0.
        parallel: Jobs of a sweep at a time, at least 1.
        restarts: How often processes that died are started again, at least 0; a mistake is not repeated.
    """

    in_this_process: ClassVar[bool] = False

    def __init__(
        self,
        *,
        processes: int | None = None,
        nodes: int = 1,
        rendezvous: str | None = None,
        grace: float = 120.0,
        parallel: int = 1,
        restarts: int = 2,
    ) -> None:
        super().__init__(parallel=parallel, restarts=restarts)
        at_least(1, nodes=nodes)
        if processes is not None:
            at_least(1, processes=processes)
        positive(grace=grace)
        if rendezvous is not None and not _is_address(rendezvous):
            raise ConfigurationError(
                "rendezvous is no address",
                found=f"rendezvous={rendezvous}",
                allowed="HOST:PORT of one of the machines, such as node1:29400",
                remedy="Name one of the machines and a port that is free there.",
            )
        self.processes, self.nodes, self.rendezvous, self.grace = processes, nodes, rendezvous, grace

    def check(self, trainer: dict[str, object]) -> None:
        """See :meth:`lightrail.Launch.check`."""
        if (self.nodes > 1) != (self.rendezvous is not None):
            raise ConfigurationError(
                "several machines need a place to meet" if self.nodes > 1 else "one machine meets nobody",
                found=f"launch.nodes={self.nodes} launch.rendezvous={self.rendezvous or 'null'}",
                allowed="launch.nodes above 1 together with launch.rendezvous=HOST:PORT",
                remedy="Set both, and type the same command on each machine.",
            )
        count = self._count(trainer)
        fitted_trainer(trainer, [], Processes(0, count * self.nodes, 0, count, "launch=torchrun"))
        if trainer.get("accelerator") in ("gpu", "cuda") and count > _graphics_cards():
            raise CompositionError(
                "the run asks for more processes than there are graphics cards",
                found=f"launch.processes={count}, trainer.accelerator={trainer['accelerator']}",
                allowed=f"at most {_graphics_cards()} on this machine",
                remedy="Ask for fewer with launch.processes=N, or use trainer.accelerator=cpu.",
            )

    def start(self, order: Order) -> Job:
        """Starts the order's supervisor in a session of its own; what it prints goes to ``launch/output.log``."""
        if self.nodes > 1:
            raise ConfigurationError(
                "the jobs of a sweep run on this machine alone",
                found=f"launch.nodes={self.nodes}",
                allowed="launch.nodes=1 with train -m",
                remedy="Leave launch.nodes out, or start the runs one by one.",
            )
        log = order.workspace / "output.log"
        with open(log, "ab") as output, signals_held_back():
            process = subprocess.Popen(
                [sys.executable, "-m", "lightrail_launch.torchrun", str(order.folder), *self._words(order.trainer)],
                cwd=order.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return self.job(order, str(process.pid), host=socket.gethostname(), born=birth_of(process.pid), log=str(log))

    def carry_out(self, order: Order) -> int:
        """Carries a single run out and waits for its end; see :meth:`lightrail.Launch.carry_out`."""
        supervisor = _supervisor(order.folder, self._words(order.trainer))
        here = socket.gethostname()
        if self.nodes == 1 or Job.of(order.folder) is None:
            self.job(order, str(os.getpid()), host=here, born=birth_of(os.getpid()), share={}).keep()
        return supervisor.carry_out()

    def _count(self, trainer: Mapping[str, object]) -> int:
        if self.processes is not None:
            return self.processes
        return 1 if trainer.get("accelerator") == "cpu" else max(1, _graphics_cards())

    def _words(self, trainer: Mapping[str, object]) -> list[str]:
        words = ["--processes", str(self._count(trainer)), "--nodes", str(self.nodes)]
        words += ["--restarts", str(self.restarts), "--grace", str(self.grace)]
        return words if self.rendezvous is None else [*words, "--rendezvous", self.rendezvous]


class ElasticSupervisor(Supervisor):
    """A supervisor whose run is several processes under torch's elastic agent.

    Of several machines, the first to come keeps the record of how the run ends; each has an agent of its own.

    Args:
        folder: The run folder.
        agent: The options of the agent, as words.
        nodes: How many machines there are.
        grace: How long the processes may take to save when they are asked to stop, in seconds.
        restarts: How often processes that died are started again.
    """

    def __init__(self, folder: Path, agent: Sequence[str], nodes: int, grace: float, restarts: int) -> None:
        super().__init__(folder, restarts)
        self._agent, self._nodes, self._grace = list(agent), nodes, grace
        self._leads = True

    def _acquire(self, lock: int) -> bool:
        self._leads = super()._acquire(lock)
        return self._leads or self._nodes > 1

    def _start(self, lock: int) -> int:
        self._note_start()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "lightrail_launch.elastic_agent", str(self.folder), *self._agent],
            cwd=self.order.directory,
            pass_fds=(lock,),
            # A terminal's Ctrl-C reaches the supervisor alone, which asks the agent once.
            start_new_session=True,
            env={
                **os.environ,
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(self._grace)),
                # Each start meets in a store of its own: in one that is kept, the addresses of the dead would be found.
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
        )
        if self.asked_to_stop is not None:
            self._child.send_signal(signal.SIGTERM)
        return self._child.wait()

    def _pass_on(self, number: int, _frame: Any) -> None:
        if self.asked_to_stop is None:
            super()._pass_on(number, _frame)
        elif number == signal.SIGINT and self._child is not None:
            self._child.kill()  # its processes notice within seconds that it is gone

    def _ended(self, status: int, reason: str = "") -> int:
        if self._leads:
            return super()._ended(status, reason)
        return status if status >= 0 else 128 - status


def _supervisor(folder: Path, words: Sequence[str]) -> ElasticSupervisor:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--grace", type=float, default=120.0)
    own, rest = parser.parse_known_args(words)
    agent = [*rest, "--nodes", str(own.nodes), "--restarts", str(own.restarts)]
    return ElasticSupervisor(folder, agent, own.nodes, own.grace, own.restarts)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def _graphics_cards() -> int:
    import torch

    return torch.cuda.device_count()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lightrail_launch.torchrun FOLDER --processes N``: the supervisor of a job in the background."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    from lightrail.command import reporting_errors

    with reporting_errors() as outcome:
        outcome.status = _supervisor(Path(words[0]), words[1:]).carry_out()
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
