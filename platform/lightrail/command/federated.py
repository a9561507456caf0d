"""``lightrail federated``: a server and clients of a federated run on machines of their own."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lightrail.errors import ConfigurationError, closest

__all__ = ["main"]

_HELP = """\
Usage: lightrail federated server [OPTIONS] [--] OVERRIDES OF train
       lightrail federated client --server HOST:PORT --client NUMBER [OPTIONS] [OVERRIDES OF ITS OWN]

server: trains as `train` does, with its clients elsewhere; waits until all of federated.clients are there
  --address HOST:PORT    where clients find it; 0.0.0.0:8000 by default, which is port 8000 on every network
  --certificates FOLDER  ca.pem, server.pem and server.key: encrypts; clients/NUMBER.pub: only these may connect
  --wait SECONDS         how long the first round waits for clients; 600 by default
  --folder FOLDER        where Flower's log goes; ./federated by default
  run.resume=FOLDER      goes on where a run stopped; clients keep running, or are started again

client: answers a server until it is stopped; one such process is one client
  --server HOST:PORT     where the server is; waited for where it is not there yet
  --client NUMBER        which client this is, from 0
  --certificate FILE     the server's ca.pem, where it encrypts
  --key FILE             the private key of this node, where the server lets only known nodes connect
  --folder FOLDER        where it keeps its state between rounds; ./federated/client-NUMBER by default
  --masked-only          takes part only where federated.secure_aggregation=true: the server sees sums alone
  --allow-targets        lets the server name classes by their path: it may then run any code here
  data.path=FILE …       its own data or device win over the server's: data=…, data.…, trainer.accelerator=…
                         all of a client's own data is its own; else the server's partition says what it has

  lightrail federated server --address 0.0.0.0:8000 -- +federated=fedavg federated.clients=2 federated.rounds=20
  lightrail federated client --server server.example.org:8000 --client 0 data.path=mine.csv
"""


def main(words: Sequence[str]) -> int:
    """Serves, or takes part.

    Args:
        words: The words after ``lightrail federated``.

    Returns:
        The exit status.

    Raises:
        UserError: Something that the user can mend.
    """
    name, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if name in ("-h", "--help") or {"-h", "--help"} & set(rest):
        print(_HELP, end="")
        return 0
    if name == "server":
        return _server(rest)
    if name == "client":
        return _client(rest)
    raise ConfigurationError(
        f"lightrail federated has no command '{name}'",
        found=" ".join(words),
        allowed="server, client",
        remedy=f"{closest(name, ('server', 'client'))}`lightrail federated --help` has examples.",
    )


class _Parser(argparse.ArgumentParser):
    """Tells a mistake as every other command does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            f"{self.prog} cannot read its options",
            found=message,
            allowed="the options that `lightrail federated --help` shows",
            remedy="Mend that option; overrides of train are KEY=VALUE, after the options.",
        )


def _parser(role: str) -> _Parser:
    parser = _Parser(prog=f"lightrail federated {role}", add_help=False, allow_abbrev=False)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    return parser


def _overrides(options: argparse.Namespace, others: Sequence[str]) -> list[str]:
    unknown = [word for word in others if word.startswith("--") and word != "--"]
    if unknown:
        raise ConfigurationError(
            f"there is no option {unknown[0]}",
            found=unknown[0],
            allowed="the options that `lightrail federated --help` shows",
            remedy="Mend its name; overrides of train have no dashes.",
        )
    return [word for word in (*options.overrides, *others) if word != "--"]


def _server(words: list[str]) -> int:
    from lightrail.federated.flower import Deployment, deployed, require_flower
    from lightrail.train import main as train

    parser = _parser("server")
    parser.add_argument("--address", default="0.0.0.0:8000")
    parser.add_argument("--certificates", type=Path)
    parser.add_argument("--wait", type=float, default=600.0)
    options, others = parser.parse_known_args(words)
    overrides = _overrides(options, others)
    require_flower()
    folder = options.folder or Path("federated")
    kept = [each for each in overrides if not each.lstrip("+").startswith("federated.engine=")]
    with deployed(Deployment(options.address, options.certificates, options.wait, folder)):
        return train([*kept, "federated.engine=flower"])


def _client(words: list[str]) -> int:
    from lightrail.federated.flower import require_flower

    parser = _parser("client")
    parser.add_argument("--server", required=True)
    parser.add_argument("--client", type=int, required=True)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--masked-only", action="store_true")
    parser.add_argument("--allow-targets", action="store_true")
    options, others = parser.parse_known_args(words)
    own = _overrides(options, others)
    require_flower()
    from lightrail.federated.flower.participant import Participant, Workshop
    from lightrail.federated.flower.supernode import Connection, serve
    from lightrail.options import at_least

    at_least(0, client=options.client)
    folder = options.folder or Path("federated") / f"client-{options.client}"
    connection = Connection(options.server, options.certificate, options.key)
    workshop = Workshop(own, allow_targets=options.allow_targets)
    participant = Participant(options.client, folder, workshop, masked_only=options.masked_only)
    # What asks a service to stop gets as orderly an end as Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    print(f"client {options.client} answers {options.server}; its state is kept in {folder}; Ctrl-C stops it")
    serve(participant, connection)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
