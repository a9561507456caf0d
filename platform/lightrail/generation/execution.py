"""Executing a generation: its folder, the samples, the record; or going on with one that was interrupted."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.errors import CheckpointError, Interrupted, UserError
from lightrail.generation.composed import Generation, compose_generation, normalised
from lightrail.generation.denoiser import Denoiser
from lightrail.generation.making import make_samples
from lightrail.generation.record import UNGUIDED, GenerationRecord, GenerationResult, Made
from lightrail.generation.sample_files import SampleFiles
from lightrail.generation.text_run import write_texts

if TYPE_CHECKING:
    from lightrail.run.folder import RunFolder

__all__ = ["GenerationResult", "generate"]

# What belongs to one start of a generation rather than to the generation.
_OF_ONE_START = ("run.resume", "run.root", "run.name", "generate.devices", "generate.accelerator")


def generate(
    overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = (), show_progress: bool = True
) -> GenerationResult:
    """Samples what the command line composes, measures it, and leaves it in a run folder.

    Args:
        overrides: What would be typed after ``generate``.
        config_dirs: Folders of the user's own configuration, searched first.
        show_progress: Whether progress is shown on standard error, and text as it is written on standard output.

    Raises:
        UserError: Something that the user can mend.
        Interrupted: A signal asked for a stop; finished batches are kept.

    Example:
        >>> result = generate(["denoiser=gaussian_mixture", "+sampler=ddim"])  # doctest: +SKIP
        >>> result.summary["metrics"]["ode_error"]  # doctest: +SKIP
    """
    from lightrail.run.interruption import Interruption
    from lightrail.run.lock import lock_of

    began = time.monotonic()
    words, folder = _resumed(normalised(overrides))
    generation = compose_generation(words, config_dirs=config_dirs)
    lock = lock_of(generation.composition, "generate")
    folder = folder or _new_folder(generation, lock)
    notes = list(generation.notes)
    for note in notes if show_progress else ():
        print(f"note: {note}", file=sys.stderr)
    interruption = Interruption()
    interruption.last_checkpoint = str(folder.path)
    record = GenerationRecord(generation, folder, began, notes)
    try:
        with interruption.listening():
            if isinstance(generation.model, Denoiser):
                told = (interruption, words, config_dirs, show_progress)
                beside = None
                if generation.guidance and generation.request["compare"]:
                    # First, so that the folder is whole when the guided samples are.
                    unguided = dataclasses.replace(generation, guidance=())
                    beside = make_samples(unguided, folder.path / UNGUIDED, *told)
                made = make_samples(generation, folder.path, *told)
                return record.samples(Made(*made), None if beside is None else Made(*beside))
            texts = write_texts(generation, show_progress)
            return record.texts(texts)
    except UserError:
        record.write("failed", {})
        raise
    except Interrupted as stop:
        record.write("stopped", {})
        stop.folder = str(folder.path)  # whichever of the samples were being drawn
        raise


def _resumed(words: Sequence[str]) -> tuple[list[str], RunFolder | None]:
    """The words of the generation that is resumed, with those typed now coming after and winning, and its folder."""
    from lightrail.run.folder import RunFolder

    typed = {word.lstrip("+").partition("=")[0]: word.partition("=")[2].strip("'\"") for word in words}
    wanted = typed.get("run.resume")
    if wanted in (None, "", "null"):
        return list(words), None
    root = Path(typed.get("run.root", "runs"))
    folder = _newest_generation(root) if wanted == "latest" else RunFolder(Path(wanted).resolve())
    files = SampleFiles(folder.path)
    if files.samples.exists() or not folder.lock.is_file():
        raise CheckpointError(
            f"there is no generation to go on with at {wanted}",
            found="a generation that is finished" if files.samples.exists() else "no folder that `generate` made",
            allowed="the folder of a generation that was interrupted, or latest",
            remedy="Start a new one: leave run.resume out.",
        )
    lock = folder.read_lock()
    changed = [w for w in words if w.lstrip("+").partition("=")[0] not in (*_OF_ONE_START, "generate.batch_size")]
    if changed:
        raise CheckpointError(
            "a generation goes on as it was begun",
            found=", ".join(changed),
            allowed="run.resume, with generate.batch_size, generate.devices or generate.accelerator",
            remedy="Leave the others out, or start a new generation without run.resume.",
        )
    kept = [o for o in lock["overrides"] if o.lstrip("+~").partition("=")[0] not in _OF_ONE_START]
    return [*kept, *(w for w in words if not w.lstrip("+").startswith("run.resume="))], folder


def _newest_generation(root: Path) -> RunFolder:
    from lightrail.run.folder import RunFolder

    begun = (*root.glob("*/batches"), *root.glob(f"*/{UNGUIDED}"))
    folders = [path.parent for path in begun if not (path.parent / "samples.safetensors").exists()]
    if not folders:
        raise CheckpointError(
            "there is no generation to go on with",
            found=f"no unfinished generation under {root}",
            allowed="one that was interrupted",
            remedy="Start one with `generate run=latest`, or say where runs are with run.root=FOLDER.",
        )
    return RunFolder(max(folders, key=lambda path: path.stat().st_mtime_ns).resolve())


def _new_folder(generation: Generation, lock: Mapping[str, Any]) -> RunFolder:
    from omegaconf import OmegaConf

    from lightrail.run.folder import RunFolder

    config = generation.composition.config
    names = {each.kind: each.name.rpartition(".")[2].replace(":", "-") for each in generation.composition.chosen}
    of = names.get("denoiser") or "run"
    folder = RunFolder.create(Path(config.run.root), config.run.name, f"generate_{of}_{names['sampler']}", bare=True)
    folder.write_text(folder.config, OmegaConf.to_yaml(config, resolve=True))
    folder.write_json(folder.lock, lock)
    return folder
