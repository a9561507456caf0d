"""Workers of data loaders outlive the signals that ask a run to stop, since it needs them until it has saved.

A cluster signals every process of a job, and Ctrl-C every process of a terminal. A worker that died of it would fail
the run in the middle of a batch, or of a validation.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _auto_add_worker_init_fn
from torch.utils.data import DataLoader

from lightrail.launch.node import PASSED_ON, signals_held_back

__all__ = ["shield_workers", "shielded"]


def shield_workers(trainer: Trainer) -> None:
    """Every loader of a trainer has such workers.

    Args:
        trainer: Not yet running.
    """
    strategy: Any = trainer.strategy
    process: Callable[[Any], Any] = strategy.process_dataloader

    def processed(loader: Any) -> Any:
        loader = process(loader)
        if isinstance(loader, DataLoader) and loader.num_workers:
            # Lightning would add what seeds the workers later, to those that have nothing yet.
            _auto_add_worker_init_fn(loader, trainer.global_rank)
        return shielded(loader)

    strategy.process_dataloader = processed


def shielded(loader: Any) -> Any:
    """The loader, whose workers end when it says so and not when somebody else does.

    Args:
        loader: Any; one without workers stays as it is, and so does every one where the system cannot tell who sent a
            signal.
    """
    if not (isinstance(loader, DataLoader) and loader.num_workers and hasattr(signal, "sigwaitinfo")):
        return loader
    if not isinstance(loader.worker_init_fn, _Shield):
        loader.worker_init_fn = _Shield(loader.worker_init_fn)
    start: Callable[[], Any] = type(loader)._get_iterator.__get__(loader)

    def started_in_peace() -> Any:
        # A worker inherits what is held back here, and is not struck before its shield is up.
        with signals_held_back():
            return start()

    loader._get_iterator = started_in_peace  # type: ignore[method-assign]
    return loader


class _Shield:
    """What a worker does first, around what it was to do.

    Args:
        inner: The loader's own ``worker_init_fn``.
    """

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self._inner = inner

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        began_it = multiprocessing.parent_process()  # which a server may have forked it for
        parent = os.getppid() if began_it is None or began_it.pid is None else began_it.pid
        threading.Thread(target=_heed_parent, args=(parent,), daemon=True).start()
        if self._inner is not None:
            self._inner(worker)


def _heed_parent(parent: int) -> None:
    while True:
        heard = signal.sigwaitinfo(PASSED_ON)
        if heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
            os._exit(0)
