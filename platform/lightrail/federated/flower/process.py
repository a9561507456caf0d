"""Flower's own processes beside one of ours, and how ours takes their tasks."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

__all__ = ["Daemon", "Endpoint", "acquired", "keep_alive"]

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class Endpoint:
    """Where a SuperLink or a SuperNode is reached.

    Args:
        address: ``HOST:PORT``.
        ca: Who vouches for it; ``None`` for no encryption.
    """

    def __init__(self, address: str, ca: bytes | None = None) -> None:
        self.address, self.ca = address, ca

    def client(self, kind: Any = RuntimeHttpClient, *interceptors: Any) -> Any:
        """A client of one of its interfaces.

        Args:
            kind: Flower's class for the interface.
            interceptors: What signs requests.
        """
        return kind.from_server_address(
            server_address=self.address,
            insecure=self.ca is None,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="lightrail"), *interceptors],
        )

    def client_for(self, token: str) -> RuntimeHttpClient:
        """A client for the task that a token is for."""
        return self.client(RuntimeHttpClient, RuntimeTokenHttpInterceptor(token))


class Daemon:
    """A SuperLink or a SuperNode that starts no programs, and goes when this process goes, however that ends.

    A secret is between the two: nobody else on this machine or another can take the tasks that are meant for us.

    Args:
        role: ``superlink`` or ``supernode``.
        words: Its arguments.
        log: Where what it says goes.
    """

    def __init__(self, role: str, words: list[str], log: Path) -> None:
        self.log = log
        self._secret = secrets.token_bytes(32)
        descriptor, path = tempfile.mkstemp(prefix="lightrail-")
        self._secret_file = Path(path)
        with open(descriptor, "wb") as file:
            file.write(self._secret)
        log.parent.mkdir(parents=True, exist_ok=True)
        program = str(Path(__file__).with_name("daemon.py"))
        own = ["--isolation", "process", "--superexec-auth-secret-file", path]
        with open(log, "ab") as said:
            # In a session of its own: Ctrl-C is for this process, which still needs it for a last word.
            self._process = subprocess.Popen(
                [sys.executable, "-P", program, role, str(os.getpid()), *own, *words],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def forget_secret(self) -> None:
        """Removes the secret from the disk, once the daemon has read it."""
        self._secret_file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-5:]) or "nothing was said"

    def claimant(self, endpoint: Endpoint) -> RuntimeHttpClient:
        """A client that may take tasks."""
        return endpoint.client(
            RuntimeHttpClient,
            SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods={_ACQUIRE}),
        )

    def stop(self) -> None:
        """Stops it, and waits until it is gone."""
        self.forget_secret()
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def acquired(claimant: RuntimeHttpClient, kind: Any) -> str:
    """The token of a task that waits; empty where none does.

    Args:
        claimant: From :meth:`Daemon.claimant`.
        kind: Of ``flwr.supercore.constant.TaskType``.
    """
    return claimant.AcquireTask(AcquireTaskRequest(supported_task_types=[kind])).token


def keep_alive(runtime: RuntimeHttpClient) -> HeartbeatSender:
    """Tells Flower that who took a task is alive, until it is stopped.

    Flower's own way interrupts the process where the task has been stopped meanwhile, which is not for it to decide.
    """
    sender = HeartbeatSender(_beat(runtime))
    sender.start()
    return sender


def _beat(runtime: RuntimeHttpClient) -> Callable[[], bool]:
    def beat() -> bool:
        try:
            runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat
