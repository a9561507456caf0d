"""Clients that Flower simulates on this machine, in processes of Ray's."""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from lightrail.errors import PluginError, UserError
from lightrail.federated.flower.exchange import FlowerTransport
from lightrail.federated.flower.participant import Factory, Participant, Workshop
from lightrail.federated.flower.supernode import reply_to
from lightrail.federated.flower.terms import Terms
from lightrail.options import at_least

__all__ = ["FlowerSimulation"]


class FlowerSimulation(FlowerTransport):
    """Carries rounds to clients in other processes of this machine, several at a time.

    Args:
        terms: What clients are told, and how long they are waited for.
        processes: How many clients work at a time; at least 1.
        folder: Where clients keep their states; one that goes with this process by default.
        make: Makes a client's worker; from the catalogue by default.

    Raises:
        PluginError: Ray is not installed.
    """

    def __init__(
        self,
        terms: Terms,
        processes: int = 1,
        folder: Path | None = None,
        make: Factory | None = None,
    ) -> None:
        super().__init__(terms)
        at_least(1, processes=processes)
        _check_ray()
        self._processes, self._folder, self._make = processes, folder, make
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._grids: queue.Queue[Grid] = queue.Queue()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def connect(self, clients: int) -> Grid:
        if self._folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="lightrail-clients-")
        folder = self._folder or Path(self._own_folder.name)  # type: ignore[union-attr]
        self._finished.clear()
        self._thread = threading.Thread(
            target=self._simulate, args=(clients, _Setting(folder, self._make)), name="flower", daemon=True
        )
        self._thread.start()
        while True:
            try:
                return self._grids.get(timeout=0.5)
            except queue.Empty:
                self.check()

    def _simulate(self, clients: int, setting: _Setting) -> None:
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._finished.wait()

        logging.getLogger("flwr").setLevel(logging.ERROR)
        try:
            run_simulation(
                server,
                _client_app(setting),
                clients,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    # Of its own, whatever else of Ray's runs on this machine, or is said to.
                    "init_args": {
                        "address": "local",
                        "num_cpus": self._processes,
                        "logging_level": "error",
                        "log_to_driver": False,
                    },
                },
            )
        except BaseException as error:
            self._error = error

    def disconnect(self) -> None:
        self._finished.set()
        if self._thread is not None:
            self._thread.join(timeout=60)
        if self._own_folder is not None:
            self._own_folder.cleanup()
            self._own_folder = None

    def check(self) -> None:
        if self._error is not None or (self._thread is not None and not self._thread.is_alive()):
            raise UserError(
                "Flower's simulation has stopped",
                found="its thread has ended" if self._error is None else repr(_first_cause(self._error)),
                allowed="a simulation that runs until the last round",
                remedy="Use federated.engine=here, which needs neither Flower nor Ray.",
            ) from self._error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@dataclass(frozen=True)
class _Setting:
    """What a process of clients is made from."""

    folder: Path
    make: Factory | None


@lru_cache(maxsize=1)
def _workshop(setting: _Setting) -> Workshop:
    # What is named by its path is of this very user.
    return Workshop(make=setting.make, allow_targets=True)


def _client_app(setting: _Setting) -> ClientApp:
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return reply_to(Participant(number, setting.folder / f"client-{number}", _workshop(setting)), message)

    app.query()(answer)
    app.train()(answer)
    return app


def _check_ray() -> None:
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise PluginError(
            "Flower's simulation needs Ray",
            found="Ray is not installed",
            allowed="lightrail with the extra flower-simulation",
            remedy="Install it with pip install 'lightrail[flower-simulation]', or use federated.engine=here, which "
            "gives the same numbers and needs neither.",
        )
