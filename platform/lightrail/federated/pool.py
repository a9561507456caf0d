"""Clients in several processes of this machine: the numbers of one process, in less time."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from lightrail.federated.pool_process import Setting, Task, flat, whole
from lightrail.federated.transport import Failure, InProcess, Order, Reply, Worker
from lightrail.federated.wire import Wire
from lightrail.step.randomness import RandomState

__all__ = ["ClientPool"]

_LOST = (OSError, EOFError, ValueError, pickle.PickleError)  # a pipe that is closed is a ValueError
_PATIENCE = 60.0  # seconds


class ClientPool(InProcess):
    """Clients in this process and in others beside it, whoever is free.

    Seeds depend on the run, the round and the client, so who does the work does not matter. What another process
    answers first is compared with what this one answers to the same; one that answers otherwise is not used, and what
    one that has gone was to do is done here.

    Args:
        make: Makes what does the work of clients here.
        overrides: That the run was composed of, and the other processes are.
        processes: How many there are, this one included; at least 2.
    """

    def __init__(self, make: Callable[[], Worker], overrides: Sequence[str], processes: int) -> None:
        super().__init__(make)
        self._overrides, self._count = overrides, processes
        self._threads = max(1, torch.get_num_threads() // processes)
        self._others: list[_Other] = []

    def open(self, clients: int) -> None:
        super().open(clients)
        setting = Setting(_for_clients(self._overrides), self._threads)
        self._others = [_Other(setting) for _ in range(min(self._count, clients) - 1)]

    def wait(self) -> None:
        """Waits until the other processes can take part, which a run need not do: they do so when they can."""
        for each in self._others:
            each.begun.wait()

    def exchange(self, orders: Sequence[Order]) -> list[Reply | Failure]:
        shared = _Shared([(order, self._states.get(order.client, {})) for order in orders], len(self._others) + 1)
        began = time.monotonic()
        threads = [threading.Thread(target=each.serve, args=(shared,), daemon=True) for each in self._others]
        with _threads_of_torch(self._threads), RandomState.kept():
            for each in threads:
                each.start()
            try:
                while tasks := shared.take(1):
                    self._work(tasks[0], shared)
            finally:
                shared.close()
            # What this process has done in this time took no other that long, unless it stands still.
            patience = _PATIENCE + 10 * (time.monotonic() - began)
            for other, thread in zip(self._others, threads, strict=True):
                thread.join(patience)
                if thread.is_alive():
                    other.give_up("it stands still")
                    thread.join()
            for task in shared.left:
                self._work(task, shared)
        self._others = [each for each in self._others if each.is_there]
        for client, (_, state) in shared.found.items():
            self._states[client] = state
        return [shared.found[order.client][0] for order in orders]

    def _work(self, task: Task, shared: _Shared) -> None:
        order = task[0]
        reply = self._answer(order)
        shared.found[order.client] = reply, self._states.get(order.client, {})
        if isinstance(reply, Reply):
            shared.show(task, (reply, self._states[order.client]))

    def close(self) -> None:
        for each in self._others:
            each.stop()
        self._others = []
        super().close()


class _Shared:
    """The work of a round, which processes take from until nothing is left.

    Args:
        tasks: The round's.
        takers: How many processes there are.
    """

    def __init__(self, tasks: Sequence[Task], takers: int) -> None:
        self.found: dict[int, tuple[Reply | Failure, Wire]] = {}
        self.left: list[Task] = []  # what another process could not do
        self.example: tuple[Task, tuple[Reply, Wire]] | None = None
        self._waiting = deque(tasks)
        self._takers = takers
        self._lock = threading.Lock()
        self._is_shown = threading.Event()

    def take(self, most: int | None = None) -> list[Task]:
        """Some of what nobody does yet: little where little is left, so that all are ready at about the same time."""
        with self._lock:
            share = max(1, len(self._waiting) // (2 * self._takers)) if most is None else most
            return [self._waiting.popleft() for _ in range(min(share, len(self._waiting)))]

    def show(self, task: Task, answer: tuple[Reply, Wire]) -> None:
        """Keeps the first answer of this process, beside which others put theirs."""
        if self.example is None:
            self.example = task, answer
            self._is_shown.set()

    def shown(self) -> tuple[Task, tuple[Reply, Wire]] | None:
        """What :meth:`show` was told; waits for it while there is work."""
        self._is_shown.wait()
        return self.example

    def close(self) -> None:
        """Nothing more will be shown."""
        self._is_shown.set()


class _Other:
    """Another process.

    Args:
        setting: What it is made from.
    """

    def __init__(self, setting: Setting) -> None:
        self.is_there = True
        self.begun = threading.Event()
        self._is_ready, self._is_proved = False, False
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        # In a session of its own: Ctrl-C is for this process, which tells the other to stop.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lightrail.federated.pool_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        threading.Thread(target=self._begin, args=(setting,), daemon=True).start()

    def _begin(self, setting: Setting) -> None:
        try:
            reason = self._asked(setting)
        except _LOST:
            reason = "it has ended"
        if reason is None:
            self._is_ready = True
        else:
            self.give_up(str(reason))
        self.begun.set()

    def serve(self, shared: _Shared) -> None:
        """Takes work until there is none, and proves first that it does it as this process does."""
        tasks: list[Task] = []
        try:
            if not self._is_ready or not (self._is_proved or self._proves(shared)):
                return
            while tasks := shared.take():
                answers = self._answers(tasks)
                for task, answer in zip(tasks, answers, strict=True):
                    if answer is None:
                        shared.left.append(task)
                    else:
                        shared.found[task[0].client] = answer
        except _LOST:
            shared.left += tasks
            self.give_up("it has ended")

    def _proves(self, shared: _Shared) -> bool:
        example = shared.shown()
        if example is None:
            return False
        task, expected = example
        answer = self._answers([task])[0]
        self._is_proved = answer is not None and _plain(*answer) == _plain(*expected)
        if not self._is_proved:
            self.give_up("its numbers are not those of this process; what was changed after composition is not there")
        return self._is_proved

    def _answers(self, tasks: Sequence[Task]) -> list[tuple[Reply, Wire] | None]:
        flat_once = {id(order.message): flat(order.message) for order, _ in tasks}
        sent = [(Order(o.client, o.round, flat_once[id(o.message)]), flat(state)) for o, state in tasks]
        return [None if each is None else (whole(each[0]), whole(each[1])) for each in self._asked(sent)]

    def _asked(self, what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(what, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def give_up(self, reason: str) -> None:
        """Ends the process, and says why."""
        if self.is_there:
            self.is_there = False
            print(f"federated: a process beside this one does no clients' work: {reason}", file=sys.stderr)
        self.stop()

    def stop(self) -> None:
        """Ends the process."""
        self.is_there = False
        self._process.kill()
        self._process.wait()
        for each in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                each.close()  # type: ignore[union-attr]


def _plain(reply: Reply, state: Wire) -> Any:
    """An answer as values that are equal where every bit is."""
    return flat(reply.message), reply.samples, {k: repr(v) for k, v in reply.metrics.items()}, flat(state)


def _for_clients(overrides: Sequence[str]) -> list[str]:
    """A run's overrides without what belongs to its one place: its folder, its loggers, its processes."""
    left_out = ("run.root", "run.resume", "logger", "federated.processes")
    kept = [each for each in overrides if not each.lstrip("+~").startswith(left_out)]
    return [*kept, "logger=[]", "federated.processes=1"]


@contextmanager
def _threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
