"""What a federated run remembers of its rounds: who answered what, who was left out and why, how much was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightrail.federated.answers import Answer
from lightrail.federated.transport import Failure
from lightrail.files import replacing

__all__ = ["FILE", "FederatedRecord", "rounds_written"]

FILE = "federated.json"
SCHEMA = 1


class FederatedRecord:
    """The rounds so far, and what they were made of.

    Example:
        >>> record = FederatedRecord()
        >>> record.add(0, [], [Failure(1, "no answer")], sent=8, received={})
        >>> record.last["left_out"]
        {'1': 'no answer'}
    """

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []

    @property
    def last(self) -> dict[str, Any]:
        """The newest round."""
        return self.rounds[-1]

    def add(
        self,
        round_index: int,
        answers: Sequence[Answer],
        failures: Sequence[Failure],
        *,
        sent: int,
        received: Mapping[int, int],
    ) -> None:
        """Keeps a round.

        Args:
            round_index: From 0.
            answers: That were used.
            failures: Whose were not.
            sent: Bytes to all clients together.
            received: Bytes from each.
        """
        self.rounds.append(
            {
                "round": round_index,
                "sent": sent,
                "received": {str(client): count for client, count in received.items()},
                "clients": {str(each.client): dict(each.metrics) for each in answers},
                "left_out": {str(each.client): each.reason for each in failures},
            }
        )

    def add_exchange(self, round_index: int, sent: int, figures: Mapping[str, float]) -> None:
        """Keeps a round of nodes that speak with each other.

        Args:
            round_index: From 0.
            sent: Bytes over all edges.
            figures: Of the nodes together.
        """
        self.rounds.append({"round": round_index, "sent": sent, "figures": dict(figures)})

    def write(self, folder: Path) -> None:
        """Writes ``federated.json``."""
        with replacing(folder / FILE) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, **self.state_dict()}), encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"about": self.about, "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.about, self.rounds = dict(state["about"]), list(state["rounds"])


def rounds_written(folder: Path) -> int:
    """How many rounds ``federated.json`` tells of; 0 where there is none that can be read.

    Args:
        folder: Of a run.
    """
    try:
        return len(json.loads((folder / FILE).read_text(encoding="utf-8"))["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
