"""Making samples: batch after batch, each kept as it is done, on one device or several."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError, DataError, Interrupted
from lightrail.generation.composed import Generation, compose_generation, device_of
from lightrail.generation.denoiser import Condition, Generated
from lightrail.generation.observing import Observations
from lightrail.generation.sample_files import Batch, SampleFiles, read_samples
from lightrail.generation.sampler import State
from lightrail.generation.sampling import invert, sample

if TYPE_CHECKING:
    from lightrail.run.interruption import Interruption

__all__ = ["make_samples"]


def make_samples(
    generation: Generation,
    folder: Path,
    interruption: Interruption,
    words: Sequence[str],
    config_dirs: Sequence[str | Path],
    show_progress: bool,
) -> tuple[Generated, float, float]:
    """Makes every sample of a generation, in batches, on one device or several.

    Args:
        generation: What samples; without its guidance for the samples that guided ones are compared with.
        folder: Where finished batches are kept.
        interruption: Knows whether a signal asked for a stop.
        words: The overrides, for the processes of other devices.
        config_dirs: The user's own folders of configuration, for them too.
        show_progress: Whether progress is shown.

    Returns:
        The samples, evaluations a sample (on average), and the seconds that all batches took together.

    Raises:
        Interrupted: A signal asked for a stop; finished batches are kept.
    """
    request = generation.request
    files = SampleFiles(folder)
    count = _count(generation)
    if files.samples.exists():
        return _finished(generation, files, count)
    files.batches.mkdir(parents=True, exist_ok=True)
    pending = files.pending(count, _batch_size(generation))
    devices = min(_devices(request), len(pending))
    meter = _Meter(generation, pending, enabled=show_progress)
    if devices > 1:
        _on_devices(generation, devices, words, config_dirs, files, pending, meter, interruption)
    else:
        _make(generation, files, pending, meter, interruption)
    meter.close()
    if files.pending(count, count):
        assert interruption.signal_number is not None
        raise Interrupted(interruption.signal_number, sum(map(len, files.done())), str(folder))
    batches = files.read()
    seconds = sum(batch.seconds for batch in batches)
    # What asks until it is content asks some batches longer than others.
    evaluations = sum(batch.evaluations * len(batch.indices) for batch in batches) / count
    files.join({"seed": str(generation.seed), "evaluations": repr(evaluations), "seconds": repr(seconds)})
    return _finished(generation, files, count)


def _finished(generation: Generation, files: SampleFiles, count: int) -> tuple[Generated, float, float]:
    """What stands in the files of a generation that is done."""
    tensors, metadata = files.finished()
    condition = {name: tensors[name] for name in tensors if name not in ("samples", "start")} or None
    observed = None
    if generation.measurement is not None:
        observed = _observations(generation).of(_numbers(generation, range(count))).map(Tensor.cpu)
    guided = bool(generation.guidance)
    generated = Generated(tensors["samples"], tensors["start"], condition, generation.levels, observed, guided)
    return generated, float(metadata["evaluations"]), float(metadata["seconds"])


def _observations(generation: Generation) -> Observations:
    assert generation.measurement is not None
    count = _count(generation) // generation.population
    return Observations(generation.measurement, generation.denoiser, generation.request, count, seed=generation.seed)


def _condition(generation: Generation, numbers: Sequence[int]) -> Condition | None:
    """What was asked for; of what is sought behind a measurement the class is not known, and none is told."""
    denoiser, request = generation.denoiser, generation.request
    condition = denoiser.condition(request, numbers)
    if generation.measurement is None or request["label"] is not None or request["prompt"] is not None:
        return condition
    try:
        return denoiser.unconditional(condition)
    except CompositionError:  # a model that was never trained without its classes
        return condition


def _numbers(generation: Generation, indices: Sequence[int]) -> list[int]:
    """What steers these samples, by number: those that are drawn together share it."""
    return [index // generation.population for index in indices]


def _batch_size(generation: Generation) -> int:
    """The size that was asked for, in whole populations."""
    size, population = int(generation.request["batch_size"]), generation.population
    return max(1, size // population) * population


def _count(generation: Generation) -> int:
    path = generation.request["invert"]
    if path is not None:
        return len(read_samples(Path(path))["samples"])
    count = int(generation.request["count"])
    if count % generation.population:
        raise CompositionError(
            "the samples do not make whole populations",
            found=f"generate.count={count}, and {generation.population} samples that are drawn together",
            allowed=f"a multiple of {generation.population}",
            remedy=f"Set generate.count={-(-count // generation.population) * generation.population}.",
        )
    return count


def _devices(request: Mapping[str, Any]) -> int:
    wanted = request["devices"]
    is_cuda = device_of(str(request["accelerator"])).type == "cuda"
    there = torch.cuda.device_count() if is_cuda else (os.cpu_count() or 1)
    if wanted == "auto":
        return there if is_cuda else 1
    if is_cuda and wanted > there:
        raise CompositionError(
            "there are fewer devices than that",
            found=f"generate.devices={wanted}",
            allowed=f"1 to {there}, or auto",
            remedy="Set generate.devices=auto.",
        )
    return int(wanted)


def _make(
    generation: Generation, files: SampleFiles, pending: Sequence[range], meter: _Meter, interruption: Interruption
) -> None:
    """Makes batches one after another, each kept as it is done, until all are or a signal asks for a stop."""
    denoiser = generation.denoiser
    to_invert = generation.request["invert"]
    given = None if to_invert is None else read_samples(Path(to_invert))
    observations = None if generation.measurement is None else _observations(generation)
    for indices in pending:
        if interruption.signal_number is not None:
            return
        began = time.monotonic()
        numbers = _numbers(generation, indices)
        condition = _condition(generation, numbers)
        if given is None:
            made = sample(
                denoiser,
                generation.solver,
                generation.levels,
                indices,
                seed=generation.seed,
                condition=condition,
                guidance=generation.guidance,
                observed=None if observations is None else observations.of(numbers),
                after_step=meter.after_step,
            )
            samples = denoiser.decode(made.x)
        else:
            if condition is not None and "label" in given:
                condition = {**condition, "label": given["label"][indices.start : indices.stop].to(denoiser.device)}
            states = denoiser.encode(given["samples"][indices.start : indices.stop].to(denoiser.device))
            x = states.to(denoiser.dtype)
            made = invert(
                denoiser, generation.solver, generation.levels, x, indices, seed=generation.seed, condition=condition
            )
            samples = made.x
        _check_finite(samples, indices)
        tensors = {"samples": samples, "start": made.start, **_rows(condition, len(indices))}
        files.write(Batch(indices, tensors, made.evaluations, time.monotonic() - began))
        meter.batch_done()


def _rows(condition: Mapping[str, Any] | None, size: int) -> dict[str, Tensor]:
    """The labels of a condition, which are worth keeping; embeddings are not."""
    label = (condition or {}).get("label")
    return {"label": label} if isinstance(label, Tensor) and label.shape == (size,) else {}


def _check_finite(samples: Tensor, indices: range) -> None:
    if not bool(samples.isfinite().all()):
        bad = int((~samples.isfinite().flatten(1).all(1)).sum())
        raise DataError(
            "the samples are not finite",
            found=f"{bad} of samples {indices.start} to {indices.stop - 1}",
            allowed="finite numbers",
            remedy="Take more sampler.steps or a lower order; at half precision, try denoiser.dtype=float32.",
        )


class _Meter:
    """The progress of all batches, in solver steps."""

    def __init__(self, generation: Generation, pending: Sequence[range], enabled: bool) -> None:
        from lightrail.run.progress import Progress

        self._per_batch = generation.levels.steps
        self._steps = 0
        self._batches = 0
        self._progress = Progress(self._per_batch * len(pending), 0, None, enabled)

    def after_step(self, state: State) -> State:
        self._steps += 1
        self._progress.to_step(min(self._steps, (self._batches + 1) * self._per_batch))
        return state

    def batch_done(self) -> None:
        self.finished(self._batches + 1)

    def finished(self, batches: int) -> None:
        self._batches, self._steps = batches, batches * self._per_batch
        self._progress.to_step(self._steps)

    def close(self) -> None:
        self._progress.close()


def _on_devices(
    generation: Generation,
    devices: int,
    words: Sequence[str],
    config_dirs: Sequence[str | Path],
    files: SampleFiles,
    pending: Sequence[range],
    meter: _Meter,
    interruption: Interruption,
) -> None:
    """One process a device; each takes every so-manieth batch."""
    before = len(files.done())
    context = torch.multiprocessing.get_context("spawn")
    arguments = (list(words), [str(each) for each in config_dirs], files.folder)
    # Who makes what is settled here: a process that starts late would find other batches pending.
    workers = [
        context.Process(
            target=_work, args=(rank, devices, list(pending[rank::devices]), *arguments, bool(generation.guidance))
        )
        for rank in range(devices)
    ]
    for worker in workers:
        worker.start()
    asked = False
    while any(worker.is_alive() for worker in workers):
        meter.finished(len(files.done()) - before)
        if interruption.signal_number is not None and not asked:
            asked = True
            for worker in workers:
                if worker.is_alive() and worker.pid is not None:
                    os.kill(worker.pid, interruption.signal_number)
        time.sleep(0.05)
    failed = [rank for rank, worker in enumerate(workers) if worker.exitcode not in (0, None)]
    if failed and interruption.signal_number is None:
        raise CompositionError(
            f"the processes of devices {failed} ended early",
            found=f"exit codes {[workers[rank].exitcode for rank in failed]}; what they said stands above",
            allowed="every device finishes its batches",
            remedy=f"Mend that, then go on with generate run.resume={files.folder}.",
        )


def _work(
    rank: int,
    world: int,
    pending: list[range],
    words: list[str],
    config_dirs: list[str],
    folder: Path,
    is_guided: bool,
) -> None:
    """What one process does."""
    from lightrail.command import reporting_errors
    from lightrail.run.interruption import Interruption

    os.environ["LOCAL_RANK"] = str(rank)  # so that one process speaks of a signal
    if torch.get_num_threads() > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    interruption = Interruption()
    with reporting_errors() as outcome, interruption.listening():
        generation = compose_generation(words, config_dirs=config_dirs)
        device = device_of(str(generation.request["accelerator"]), rank)
        generation = dataclasses.replace(generation, model=generation.denoiser.to(device))
        if not is_guided:
            generation = dataclasses.replace(generation, guidance=())
        _make(generation, SampleFiles(folder), pending, _Meter(generation, pending, enabled=False), interruption)
    if outcome.status:
        sys.exit(outcome.status)
