"""One way of training one model, in a process of its own: the time of its steps and the memory they take."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightrail.bench.privacy_models import MODELS, Classification, Records, loss_of, records_for

__all__ = ["OPACUS", "WAYS", "WITH_FOUR_DRAWS", "Meter", "main"]

WARM = 2  # steps before the clock runs; the first of ours compares samples with samples alone
WITH_FOUR_DRAWS = "Opacus ghost, four draws"
OPACUS = {**{f"Opacus {mode}": mode for mode in ("hooks", "functorch", "ew", "ghost")}, WITH_FOUR_DRAWS: "ghost"}
WAYS = ("plain", "ours", *OPACUS)
_NOISE, _CLIP, _RATE = 1.0, 1.0, 0.01


class Meter:
    """Notes the time at which each step begins, and the most memory that was held since the model was made.

    On a processor, memory is what the process holds beyond what it held with its libraries loaded; on an accelerator
    it is what tensors take there, parameters included.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._times: list[float] = []
        # The time of this process, since the processor may be shared; an accelerator's time is that of the clock.
        self._clock = time.perf_counter if self._is_accelerator else time.process_time
        self._whole = self._steady = 0
        self._forget_peak()
        self._base = 0 if self._is_accelerator else _status("VmRSS")

    @property
    def _is_accelerator(self) -> bool:
        return self._device.type == "cuda"

    def begun(self, step: int) -> None:
        """A step begins."""
        if self._is_accelerator:
            torch.cuda.synchronize(self._device)
        if step == WARM:
            self._whole = self._peak()
            self._forget_peak()
        if step >= WARM:
            # Read here: what comes after the last step, such as a checkpoint, is no part of a step.
            self._steady = self._peak()
            self._times.append(self._clock())

    def found(self) -> dict[str, float]:
        """Milliseconds a step, and megabytes: of the steps that are timed, and with those before them."""
        each = [1e3 * (b - a) for a, b in zip(self._times, self._times[1:], strict=False)]
        scale = 1 / 2**20
        return {
            "milliseconds": median(each),
            "memory": (self._steady - self._base) * scale,
            "whole": (max(self._whole, self._steady) - self._base) * scale,
        }

    def _forget_peak(self) -> None:
        gc.collect()
        if self._is_accelerator:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        # What was freed is handed back first: else it would count as held.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._is_accelerator else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _batches(loader: Any, device: str) -> Iterator[Sequence[Any]]:
    for batch in loader:
        yield [each.to(device) for each in batch]


def _plain(model: str, batch: int, steps: int, device: str, begun: Callable[[int], None]) -> None:
    net = MODELS[model][0]().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=_RATE)
    loader = Records(model, batch * steps, batch).train_dataloader()
    for step, (x, y) in enumerate(_batches(loader, device)):
        begun(step)
        optimizer.zero_grad()
        loss = loss_of(net(x), y)
        loss.backward()
        optimizer.step()


def _opacus(way: str, model: str, batch: int, steps: int, device: str, begun: Callable[[int], None]) -> None:
    from opacus import PrivacyEngine

    net = MODELS[model][0]().to(device)
    criterion: Any = torch.nn.CrossEntropyLoss()
    made: Any = PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=_RATE),
        criterion=criterion,
        data_loader=torch.utils.data.DataLoader(records_for(model, batch * steps), batch, shuffle=True),
        noise_multiplier=_NOISE,
        max_grad_norm=_CLIP,
        poisson_sampling=False,
        grad_sample_mode=OPACUS[way],
    )
    net, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else criterion
    # Its secure mode asks for a generator that cannot be installed; what it does with one is measured.
    optimizer.secure_mode = way == WITH_FOUR_DRAWS
    net.train()
    for step, (x, y) in enumerate(_batches(loader, device)):
        begun(step)
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        optimizer.step()


def _ours(model: str, batch: int, steps: int, device: str, begun: Callable[[int], None]) -> None:
    from lightrail.run import compose

    with tempfile.TemporaryDirectory() as folder:
        run = compose(
            [
                f"task={Classification.__module__}.Classification", f"task.network={model}",
                f"data={Records.__module__}.Records", f"data.network={model}", f"data.count={batch * steps}",
                f"data.batch_size={batch}", "optimizer=sgd", f"optimizer.lr={_RATE}", "optimizer.momentum=0",
                "schedule=null", "+privacy=dp_sgd", f"privacy.noise={_NOISE}", f"privacy.clip_norm={_CLIP}",
                "privacy.sampling=shuffle", f"privacy.max_physical_batch={batch}", "logger=[]",
                "trainer.max_epochs=1", f"trainer.accelerator={'gpu' if device == 'cuda' else device}",
                "trainer.devices=1", f"run.root={folder}",
            ]
        )  # fmt: skip
        run.task.begun = begun  # type: ignore[assignment]
        run.execute()


def _run(way: str, model: str, batch: int, steps: int, device: str, begun: Callable[[int], None]) -> None:
    if way in OPACUS:
        _opacus(way, model, batch, steps, device, begun)
    else:
        (_plain if way == "plain" else _ours)(model, batch, steps, device, begun)


def main(arguments: Sequence[str]) -> int:
    """Measures one way with one model, and prints what it found as JSON.

    Args:
        arguments: The words after ``python -m lightrail.bench.privacy_ways``.
    """
    parser = argparse.ArgumentParser(prog="lightrail.bench.privacy_ways")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    # Libraries are loaded and threads are started by training something small in the same way.
    _run(options.way, "tiny", 4, WARM + 1, options.device, lambda _: None)
    meter = Meter(options.device)
    # The last step only says when the one before it ended.
    _run(options.way, options.model, options.batch, WARM + options.steps + 1, options.device, meter.begun)
    print(json.dumps(meter.found()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
