"""A client of a federated run that stops to work in one round, as a process of its own."""

from __future__ import annotations

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

    def about(self) -> dict[str, object]:
        return self.worker.about()


class StallingWorkshop(Workshop):
    def __init__(self, round_index: int, marker: Path) -> None:
        super().__init__()
        self.round, self.marker = round_index, marker

    def worker_for(self, words: dict[str, str]) -> Worker:  # type: ignore[override]
        return Stalls(super().worker_for(words), self.round, self.marker)


def take_part(address: str, number: int, folder: Path, stalls_in: int) -> None:
    workshop = StallingWorkshop(stalls_in, folder / f"stalled-{number}")
    serve(Participant(number, folder / f"client-{number}", workshop), Connection(address))
