"""What a generation leaves behind: summary, pictures, report, and what is logged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightrail.generation.composed import Generation
from lightrail.generation.denoiser import Generated
from lightrail.generation.text_run import prompts_of

if TYPE_CHECKING:
    from lightrail.run.folder import RunFolder

__all__ = ["UNGUIDED", "GenerationRecord", "GenerationResult", "Made"]

UNGUIDED = "unguided"  # the folder, in that of a guided generation, of the samples that it is compared with


@dataclass(frozen=True)
class Made:
    """Samples that are finished, and what they cost.

    Args:
        generated: All of them.
        evaluations: How often the network was asked for each, on average.
        seconds: How long all batches took together.
    """

    generated: Generated
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class GenerationResult:
    """What a generation gave.

    Args:
        folder: Its folder.
        summary: What ``summary.json`` holds.
        samples: In the user's units, one row a sample; ``None`` for text.
        text: What a language model wrote, without the prompt; ``None`` for samples.
    """

    folder: Path
    summary: Mapping[str, Any]
    samples: Tensor | None = None
    text: tuple[str, ...] | None = None


class GenerationRecord:
    """What is written about a generation when it ends, however it ends.

    Args:
        generation: What samples.
        folder: Where it is written.
        began: When it began, on the monotonic clock.
        notes: What its reader should know.
    """

    def __init__(self, generation: Generation, folder: RunFolder, began: float, notes: list[str]) -> None:
        self._generation = generation
        self._folder = folder
        self._began = began
        self._notes = notes

    def samples(self, made: Made, unguided: Made | None = None) -> GenerationResult:
        """Measures and shows samples that are finished.

        Args:
            made: The samples.
            unguided: Those of the same numbers without guidance, to compare with.
        """
        from lightrail.generation.pictures import observed_figures, sample_figures, save_picture

        denoiser, generated = self._generation.denoiser, made.generated
        metrics = self._measured(generated)
        figures = sample_figures(denoiser, generated)
        pictures = {"samples": save_picture(figures, generated, self._folder.path)}
        count = len(generated.samples)
        measured: dict[str, Any] = {"samples": count, **_cost(made)}
        logged = {**metrics, **measured, "samples_per_second": count / made.seconds}
        if unguided is not None:
            beside = {"metrics": self._measured(unguided.generated), **_cost(unguided)}
            measured["unguided"] = beside
            theirs = sample_figures(denoiser, unguided.generated)
            pictures[f"samples/{UNGUIDED}"] = save_picture(theirs, unguided.generated, self._folder.path / UNGUIDED)
            figures = _side_by_side(figures, theirs)
            logged |= {f"{UNGUIDED}/{name}": value for name, value in beside["metrics"].items()}
        figures |= observed_figures(generated)
        summary = self.write("finished", metrics, figures=figures, **measured)
        self._log(logged, pictures)
        return GenerationResult(self._folder.path, summary, samples=generated.samples)

    def _measured(self, generated: Generated) -> dict[str, float]:
        """What the model says of samples, and what each guidance is meant to move."""
        if self._generation.request["invert"] is not None:
            return {}
        found = dict(self._generation.denoiser.measure(generated))
        for each in self._generation.guidance:
            found |= each.measure(generated)
        return {**found, **_restored(generated)}

    def texts(self, texts: Sequence[str]) -> GenerationResult:
        """Keeps texts that are finished."""
        prompts = prompts_of(self._generation)
        content = {"prompts": prompts, "texts": list(texts)}
        self._folder.write_json(self._folder.path / "texts.json", content)
        self._folder.write_text(self._folder.path / "texts.txt", "\n\n".join(map(add, prompts, texts)) + "\n")
        seconds = time.monotonic() - self._began
        tokens = len(texts) * int(self._generation.request["length"])
        summary = self.write("finished", {}, samples=len(texts), tokens=tokens, sampling_seconds=round(seconds, 3))
        self._log({"samples": len(texts), "tokens": tokens}, {})
        return GenerationResult(self._folder.path, summary, text=tuple(texts))

    def write(
        self, status: str, metrics: Mapping[str, float], *, figures: Any = None, **measured: Any
    ) -> dict[str, Any]:
        from lightrail.report import write_report

        generation = self._generation
        summary = {
            "name": self._folder.path.name,
            "command": "generate",
            "status": status,
            "metrics": dict(metrics),
            **measured,
            "wall_time": round(time.monotonic() - self._began, 3),
            "device": str(getattr(generation.model, "device", "cpu")),
            "model": None if generation.trained is None else str(generation.trained.checkpoint),
            "notes": self._notes,
        }
        self._folder.write_json(self._folder.summary, summary)
        write_report(self._folder.path, figures=figures or {})
        return summary

    def _log(self, values: Mapping[str, float], pictures: Mapping[str, Path | None]) -> None:
        from omegaconf import OmegaConf

        for make in _loggers(self._generation):
            logger = make(str(self._folder.path))
            logger.log_hyperparams(OmegaConf.to_container(self._generation.composition.config, resolve=True))
            logger.log_metrics(dict(values), 0)
            if callable(log_image := getattr(logger, "log_image", None)):
                for name, picture in pictures.items():
                    if picture is not None:
                        log_image(name, [str(picture)], step=0)
            if callable(close := getattr(logger, "close", None)):
                close()


def _cost(made: Made) -> dict[str, Any]:
    asked = made.evaluations
    evaluations = int(asked) if asked == int(asked) else round(asked, 1)
    return {"evaluations": evaluations, "sampling_seconds": round(made.seconds, 3)}


def _side_by_side(guided: Mapping[str, Any], unguided: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of both, those of one name one after the other."""
    both: dict[str, Any] = {}
    for name in (*guided, *(each for each in unguided if each not in guided)):
        both |= {f"{name}, guided": guided[name]} if name in guided else {}
        both |= {f"{name}, {UNGUIDED}": unguided[name]} if name in unguided else {}
    return both


def _restored(generated: Generated) -> dict[str, float]:
    """How near samples are to what was measured of them, and to what was measured."""
    observed = generated.observed
    if observed is None:
        return {}
    samples = generated.samples.to(observed.value.dtype)
    found = {"residual": float(observed.residual(samples).square().mean().sqrt())}
    if observed.truth is not None:
        squares = (samples - observed.truth).square().flatten(1).mean(1)
        found["rmse"] = float(squares.mean().sqrt())
        if samples.ndim == 4:
            found["psnr"] = float((-10 * squares.clamp(min=1e-10).log10()).mean())
    return found


def _loggers(generation: Generation) -> list[Callable[[str], Any]]:
    from lightrail.catalogue import import_target
    from lightrail.run.build import make
    from lightrail.run.resolve import Resolved

    chosen = [each for each in generation.composition.chosen if each.kind == "logger"]
    resolved = Resolved({}, {each.path: import_target(each.target) for each in chosen}, ())
    return [lambda folder, each=each: make(resolved, each, {"folder": folder}) for each in chosen]
