"""A SuperLink of the run's own: started with it, gone with it, and driven from the process that trains.

Flower would run a server's program in a process that it starts itself. Here the training process claims that task, so
that its progress, its signals and its run folder are those of any other run. The SuperLink starts no programs: whoever
submits one to it finds nobody who runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from lightrail.errors import ConfigurationError, UserError
from lightrail.federated.flower.process import Daemon, Endpoint, acquired, keep_alive

__all__ = ["Certificates", "SuperLink", "parse_address"]

_APP = {
    "pyproject.toml": b'[project]\nname = "lightrail"\nversion = "0.1.0"\n[tool.flwr.app]\npublisher = "lightrail"\n'
    b'[tool.flwr.app.components]\nserverapp = "none:server"\nclientapp = "none:client"\n',
    "none.py": b"# The server and the clients of lightrail are programs of their own.\n",
}
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Certificates:
    """The files of a server that encrypts.

    Args:
        folder: Holds ``ca.pem``, ``server.pem`` and ``server.key``; where it also holds ``clients/NUMBER.pub``, only
            the nodes that have the private keys to these may connect.

    Raises:
        ConfigurationError: A file is missing.
    """

    folder: Path

    def __post_init__(self) -> None:
        for name in ("ca.pem", "server.pem", "server.key"):
            if not (self.folder / name).is_file():
                raise ConfigurationError(
                    f"the certificates lack {name}",
                    found=f"{self.folder}: {', '.join(sorted(p.name for p in self.folder.glob('*'))[:5]) or 'nothing'}",
                    allowed="a folder with ca.pem, server.pem and server.key",
                    remedy="Make one with scripts/federated-certificates FOLDER NAME-OF-THIS-MACHINE.",
                )

    @property
    def ca(self) -> bytes:
        """Who vouches for the server."""
        return (self.folder / "ca.pem").read_bytes()

    def public_keys(self) -> dict[int, bytes]:
        """The public keys of the clients' nodes by the client's number; empty where any node may connect."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        keys = {}
        for path in sorted((self.folder / "clients").glob("*.pub")):
            try:
                number, key = int(path.stem), load_ssh_public_key(path.read_bytes())
                assert isinstance(key, ec.EllipticCurvePublicKey)
            except (ValueError, AssertionError) as error:
                raise ConfigurationError(
                    f"{path.name} is no key of a client",
                    found=str(path),
                    allowed="NUMBER.pub, an ECDSA public key in OpenSSH's form",
                    remedy="Make it with ssh-keygen -t ecdsa -b 384, or take it out of the folder.",
                ) from error
            keys[number] = public_key_to_bytes(key)
        return keys

    def arguments(self) -> list[str]:
        """What tells a SuperLink of these files."""
        files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
        given = [word for name, file in files.items() for word in (f"--ssl-{name}", str(self.folder / file))]
        return [*given, *(["--enable-supernode-auth"] if self.public_keys() else [])]


class SuperLink:
    """A running SuperLink, and the grid to its nodes.

    Args:
        address: ``HOST:PORT`` where nodes find it; ``0.0.0.0`` for every network of this machine.
        certificates: What it encrypts with; ``None`` for no encryption.
        log: Where what Flower says goes.

    Raises:
        ConfigurationError: The address cannot be had.
        UserError: It does not start.
    """

    def __init__(self, address: str, certificates: Certificates | None, log: Path) -> None:
        host, port = parse_address(address)
        _check_free(host, port)
        ca = None if certificates is None else certificates.ca
        self._endpoint = Endpoint(f"127.0.0.1:{port}" if host == "0.0.0.0" else address, ca)
        words = ["--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
        words += ["--insecure"] if certificates is None else certificates.arguments()
        self._daemon = Daemon("superlink", words, log)
        self._heartbeat: HeartbeatSender | None = None
        self._grid: HttpGrid | None = None
        try:
            self._wait()
            self._daemon.forget_secret()
            self._register({} if certificates is None else certificates.public_keys())
            self.grid = self._grid = self._drive()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raises where the SuperLink has stopped.

        Raises:
            UserError: It has, and this is what it said last.
        """
        if not self._daemon.is_running:
            raise self._failure("has stopped")

    def _failure(self, what: str) -> UserError:
        return UserError(
            f"Flower's SuperLink {what}",
            found=self._daemon.last_words(),
            allowed="a SuperLink that runs until the last round",
            remedy=f"See {self._daemon.log} for the whole of it; go on with run.resume=FOLDER.",
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self.check()
            with contextlib.suppress(OSError), socket.create_connection(parse_address(self._endpoint.address), 1.0):
                return
            if time.monotonic() > deadline:
                raise self._failure("does not answer")
            time.sleep(0.1)

    def _register(self, keys: dict[int, bytes]) -> None:
        with contextlib.closing(self._endpoint.client(ControlHttpClient)) as control:
            for number, key in keys.items():
                control.RegisterNode(RegisterNodeRequest(public_key=key, name=f"client-{number}"))

    def _drive(self) -> HttpGrid:
        """Submits a run whose server is this process, and takes that part."""
        content = build_fab_from_files(_APP)[0]
        with contextlib.closing(self._endpoint.client(ControlHttpClient)) as control:
            fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
            control.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        deadline = time.monotonic() + _START_SECONDS
        with contextlib.closing(self._daemon.claimant(self._endpoint)) as claimant:
            while not (token := acquired(claimant, TaskType.SERVER_APP)):
                self.check()
                if time.monotonic() > deadline:
                    raise self._failure("gives this run no task")
                time.sleep(0.1)
        grid = HttpGrid(self._endpoint.address, self._endpoint.ca is None, self._endpoint.ca, token=token)
        # Who waits for answers asks again, and sees whether the SuperLink is still there.
        grid._retry_invoker.max_tries = 1
        runtime = grid._runtime_client
        self._heartbeat = keep_alive(runtime)
        task = runtime.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        return grid

    def stop(self) -> None:
        """Ends the run at the SuperLink, and the SuperLink."""
        if self._grid is not None and self._daemon.is_running:
            with contextlib.suppress(httpx.HTTPError):
                self._grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        if self._grid is not None:
            self._grid.close()
        self._daemon.stop()


def parse_address(address: str) -> tuple[str, int]:
    """The host and the port in ``HOST:PORT``.

    Raises:
        ConfigurationError: It is something else.

    Example:
        >>> parse_address("0.0.0.0:8000")
        ('0.0.0.0', 8000)
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigurationError(
            "an address is HOST:PORT",
            found=address,
            allowed="such as 0.0.0.0:8000 or server.example.org:8000",
            remedy="Write the host, a colon, and a port from 1 to 65535.",
        )
    return host, int(port)


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"{host}:{port} cannot be listened on",
                found=error.strerror or str(error),
                allowed="an address of this machine with a port that is free",
                remedy="Choose another with --address HOST:PORT, or stop what listens there.",
            ) from error
