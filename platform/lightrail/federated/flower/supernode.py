"""A client's process: a SuperNode beside it fetches messages, and it answers them until it is stopped."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from lightrail.errors import ConfigurationError
from lightrail.federated.flower.participant import Participant
from lightrail.federated.flower.process import Daemon, Endpoint, acquired, keep_alive
from lightrail.federated.flower.records import Parcel, parcel_of, records_of
from lightrail.federated.flower.superlink import parse_address

__all__ = ["Connection", "reply_to", "serve"]

_PAUSE = 0.2
# Between two attempts to reach a server that is not there.
_AGAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Connection:
    """How a client reaches the server.

    Args:
        server: ``HOST:PORT``.
        certificate: Of who vouches for the server; ``None`` for no encryption.
        key: The private key of this node, where the server lets only known nodes connect.

    Raises:
        ConfigurationError: An address that is none, a file that is missing, or a key without encryption.
    """

    server: str
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        parse_address(self.server)
        for name, path in (("certificate", self.certificate), ("key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigurationError(
                    f"the {name} is not there",
                    found=str(path),
                    allowed="a file that scripts/federated-certificates made",
                    remedy=f"Say where it is with --{name} FILE.",
                )
        if self.key is not None and self.certificate is None:
            raise ConfigurationError(
                "a key needs a certificate",
                found="--key without --certificate",
                allowed="both, or neither",
                remedy="Give the server's ca.pem with --certificate.",
            )

    def arguments(self) -> list[str]:
        """What tells a SuperNode of this."""
        words = ["--superlink", self.server]
        words += ["--insecure"] if self.certificate is None else ["--root-certificates", str(self.certificate)]
        return words + ([] if self.key is None else ["--auth-supernode-private-key", str(self.key)])


def serve(client: Participant, connection: Connection) -> None:
    """Answers what the server asks, until this process is interrupted.

    Args:
        client: Who answers.
        connection: Where the server is. A server that is not there yet, or no longer, is waited for.
    """
    log = client.folder / "supernode.log"
    while True:
        endpoint = Endpoint(f"127.0.0.1:{_free_port()}")
        host, port = parse_address(endpoint.address)
        node = Daemon("supernode", ["--host", host, "--port", str(port), *connection.arguments()], log)
        try:
            with contextlib.closing(node.claimant(endpoint)) as claimant:
                while node.is_running:
                    if _answer_next(client, claimant, endpoint):
                        node.forget_secret()
        finally:
            node.stop()
        # It ends where the server no longer knows it, or never did: a new one introduces itself anew.
        print(f"client {client.number}: the server has ended the connection, connecting again: {log}", file=sys.stderr)
        time.sleep(_AGAIN_SECONDS)


def _answer_next(client: Participant, claimant: RuntimeHttpClient, endpoint: Endpoint) -> bool:
    """Answers a message, where one waits; whether the SuperNode could be asked for one."""
    try:
        token = acquired(claimant, TaskType.CLIENT_APP)
    except httpx.HTTPError:
        time.sleep(_PAUSE)
        return False
    if not token:
        time.sleep(_PAUSE)
        return True
    with contextlib.closing(endpoint.client_for(token)) as task:
        alive = keep_alive(task)
        try:
            message, context, _, _ = pull_task_input(task)
            push_message(task, reply_to(client, message), context)
            push_task_output(task, context, SubStatus.COMPLETED, "")
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            print(f"client {client.number}: an answer was lost: {type(error).__name__}: {error}", file=sys.stderr)
            push_task_output(task, None, SubStatus.FAILED, type(error).__name__)
        finally:
            if alive.is_running:
                alive.stop()
    return True


def reply_to(client: Participant, message: Message) -> Message:
    """A client's answer to a message of Flower's.

    Args:
        client: Who answers.
        message: What came.
    """
    kind = message.metadata.message_type
    try:
        parcel = client.answer(kind, parcel_of(message.content))
    except ValueError as error:
        parcel = Parcel(figures={"client": client.number}, words={"failed": str(error)})
    return Message(records_of(parcel), reply_to=message)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
