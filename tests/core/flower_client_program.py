"""A client of a federated run that stops to work in one round: ADDRESS NUMBER FOLDER [ROUND MARKER]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lightrail.federated.flower.participant import Participant, Workshop
from lightrail.federated.flower.supernode import Connection, serve
from lightrail.federated.transport import Order, Reply, Worker
from lightrail.federated.wire import Wire


class Stalls:
    """Works as another does, until a round."""

    def __init__(self, worker: Worker, round_index: int, marker: Path) -> None:
        self.worker, self.round, self.marker = worker, round_index, marker

    def work(self, order: Order, state: Wire) -> tuple[Reply, Wire]:
        if order.round == self.round:
            self.marker.touch()
            time.sleep(600)
        return self.worker.work(order, state)


class StallingWorkshop(Workshop):
    def worker_for(self, words: dict[str, str]) -> Worker:  # type: ignore[override]
        worker = super().worker_for(words)
        return Stalls(worker, int(sys.argv[4]), Path(sys.argv[5])) if len(sys.argv) > 4 else worker


if __name__ == "__main__":
    number = int(sys.argv[2])
    serve(Participant(number, Path(sys.argv[3]), StallingWorkshop()), Connection(sys.argv[1]))
