"""From a command line to what samples: the model, the solver with its wrappers, the times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrail.errors import CompositionError
from lightrail.generation.chosen import made
from lightrail.generation.denoiser import Denoiser
from lightrail.generation.guidance import Guidance
from lightrail.generation.measurement import Measurement
from lightrail.generation.sampler import Sampler, SamplerWrapper
from lightrail.generation.sampling import check_fit
from lightrail.generation.steering import chosen_guidance, chosen_measurement, refuse_what_is_not_read
from lightrail.generation.text import TextModel, TokenSampler
from lightrail.generation.time_grid import Grid, TimeGrid
from lightrail.generation.trained_run import TrainedRun, load_trained

if TYPE_CHECKING:
    import torch

    from lightrail.configuration import Composition
    from lightrail.run.resolve import Resolved

__all__ = ["Generation", "compose_generation", "normalised"]

TEXT_SAMPLER = "top_p"
NO_CLASS = "class: none is told, as that of what was measured is not known; generate.label tells one"


@dataclass(frozen=True)
class Generation:
    """What a command line composed, ready to sample.

    Args:
        composition: The configuration and the plugins that were chosen.
        model: What is sampled.
        sampler: The solver, inside its wrappers; or what chooses tokens.
        time_grid: The spacing of times; ``None`` for text.
        grid: The levels that are visited; ``None`` for text.
        request: The ``generate`` group.
        seed: Of everything that is drawn.
        trained: The run that trained the model, where there is one.
        guidance: What steers the samples, in order.
        measurement: What is measured of the samples that are sought.
        population: How many samples, one after the other, are drawn together.
        notes: What was decided for the user, one sentence each.
    """

    composition: Composition
    model: Denoiser | TextModel
    sampler: Sampler | TokenSampler
    time_grid: TimeGrid | None
    grid: Grid | None
    request: Mapping[str, Any]
    seed: int
    trained: TrainedRun | None
    guidance: tuple[Guidance, ...] = ()
    measurement: Measurement | None = None
    population: int = 1
    notes: tuple[str, ...] = ()

    @property
    def denoiser(self) -> Denoiser:
        """The model, of one that is no language model."""
        assert isinstance(self.model, Denoiser)
        return self.model

    @property
    def solver(self) -> Sampler:
        """The sampler, of one that is no language model."""
        assert isinstance(self.sampler, Sampler)
        return self.sampler

    @property
    def levels(self) -> Grid:
        """The grid, of one that is no language model."""
        assert self.grid is not None
        return self.grid


def normalised(overrides: Sequence[str]) -> list[str]:
    """The overrides with short forms written out: ``run=FOLDER`` for ``run.from=FOLDER``, and what is measured, a
    group of its own, without ``generate.`` before it."""
    words = []
    for each in overrides:
        key, equals, value = each.partition("=")
        plain = key.lstrip("+")
        if equals and plain == "run":
            words.append(f"run.from={value}")
        elif equals and f"{plain}.".startswith("generate.measurement."):
            words.append(f"{plain.removeprefix('generate.')}={value}")
        else:
            words.append(each)
    return words


def compose_generation(
    overrides: Sequence[str] = (),
    *,
    config_dirs: Sequence[str | Path] = (),
    config_name: str = "generate",
    device: torch.device | None = None,
) -> Generation:
    """Composes what samples.

    Args:
        overrides: As typed after the command.
        config_dirs: The user's own folders of configurations.
        config_name: ``generate`` or ``search``.
        device: Where the model goes; chosen by ``generate.accelerator`` where none is given.

    Raises:
        UserError: Anything that cannot work, before anything is sampled.
    """
    from lightrail.configuration import compose

    words = normalised(overrides)
    dirs = [str(each) for each in config_dirs]
    composition = compose(words, config_name=config_name, config_dirs=dirs)
    config = composition.config
    trained = _trained(composition, dirs)
    resolved = _resolved(composition)
    device = device or device_of(str(config.generate.accelerator))
    model = _model(resolved, trained, device)
    chosen: list[str] = []
    if resolved.one("sampler") is None:
        name = model.sampler_name if isinstance(model, Denoiser) else TEXT_SAMPLER
        composition, resolved = _with(words, chosen, f"sampler={name}", config_name, dirs)
    sampler = _sampler(resolved, model)
    if not isinstance(model, Denoiser) or not isinstance(sampler, Sampler):
        _refuse_for_text(resolved)
        return _generation(composition, model, sampler, None, None, trained, chosen)
    if resolved.one("time_grid") is None:
        name = sampler.grid_name
        composition, resolved = _with(words, chosen, f"time_grid={name}", config_name, dirs)
    times = made(resolved, "time_grid", TimeGrid)
    chosen_sampler = resolved.one("sampler")
    check_fit(model, sampler, None if chosen_sampler is None else chosen_sampler.options)
    sampler.prepare(model)
    grid = sampler.grid(model.path, times)
    found = _generation(composition, model, sampler, times, grid, trained, chosen)
    guidance = chosen_guidance(resolved, model, sampler, partial(load_trained, root=config.run.root, config_dirs=dirs))
    refuse_what_is_not_read(found.request, guidance, resolved.one("measurement") is not None)
    measurement = chosen_measurement(resolved, model, guidance)
    tells_no_class = measurement is not None and model.classes and found.request["label"] is None
    notes = (*found.notes, *([NO_CLASS] if tells_no_class else []))
    population = math.lcm(*(each.population for each in guidance))
    return dataclasses.replace(found, guidance=guidance, measurement=measurement, population=population, notes=notes)


def _generation(
    composition: Composition,
    model: Any,
    sampler: Any,
    times: TimeGrid | None,
    grid: Grid | None,
    trained: TrainedRun | None,
    chosen: Sequence[str],
) -> Generation:
    from omegaconf import OmegaConf

    request: Any = OmegaConf.to_container(composition.config.generate, resolve=True)
    notes = tuple(f"{each.replace('=', ': ')}, which suits the model" for each in chosen)
    seed = int(composition.config.seed)
    return Generation(composition, model, sampler, times, grid, request, seed, trained, notes=notes)


def _with(
    words: Sequence[str], chosen: list[str], choice: str, config_name: str, dirs: Sequence[str]
) -> tuple[Composition, Resolved]:
    """The composition with one more choice, which the user left open."""
    from lightrail.configuration import compose

    chosen.append(choice)
    composition = compose([*words, *chosen], config_name=config_name, config_dirs=list(dirs))
    # What was typed is what the lock and the report repeat.
    composition = dataclasses.replace(composition, overrides=tuple(words))
    return composition, _resolved(composition)


def _trained(composition: Composition, dirs: Sequence[str]) -> TrainedRun | None:
    run = composition.config.run["from"]
    denoiser = next((each for each in composition.chosen if each.kind == "denoiser"), None)
    if (run is None) == (denoiser is None):
        both = run is not None
        raise CompositionError(
            "it is not clear what to sample" if both else "there is nothing to sample",
            found=f"run={run} and denoiser={denoiser.name}" if denoiser else "neither run=FOLDER nor denoiser=NAME",
            allowed="one of the two",
            remedy="Leave one of them out." if both else "Name a finished run: generate run=latest, or run=FOLDER.",
        )
    return None if run is None else load_trained(str(run), composition.config.run.root, dirs)


def _resolved(composition: Composition) -> Resolved:
    from lightrail.catalogue import import_target
    from lightrail.run.resolve import Resolved

    grouped: dict[str, tuple[Any, ...]] = {}
    for each in composition.chosen:
        grouped[each.kind] = (*grouped.get(each.kind, ()), each)
    return Resolved(grouped, {each.path: import_target(each.target) for each in composition.chosen}, ())


def _model(resolved: Resolved, trained: TrainedRun | None, device: torch.device) -> Denoiser | TextModel:
    if trained is None:
        found = made(resolved, "denoiser", Denoiser)
        found.to(device)
        return found
    task: Any = trained.task
    if callable(getattr(task, "denoiser", None)):
        task.to(device)
        denoiser = task.denoiser()
        denoiser.attach(trained.data, trained.folder)
        return denoiser
    if isinstance(task, TextModel):
        task.to(device)  # type: ignore[attr-defined]
        return task
    raise CompositionError(
        f"the task of this run, {type(task).__name__}, does not generate",
        found=f"a run whose task has neither denoiser() nor next_logits(); {trained.checkpoint}",
        allowed="a generative task (diffusion, flow_matching, …) or a language model",
        remedy="Train one first: train experiment=digits_diffusion, then generate run=latest.",
    )


def _sampler(resolved: Resolved, model: Denoiser | TextModel) -> Sampler | TokenSampler:
    from lightrail.run.build import make

    chosen = resolved.one("sampler")
    assert chosen is not None
    sampler = make(resolved, chosen)
    wanted = Sampler if isinstance(model, Denoiser) else TokenSampler
    if not isinstance(sampler, wanted):
        other = "diffusion and flow models" if wanted is Sampler else "language models"
        raise CompositionError(
            f"sampler '{chosen.name}' is not one for {other}",
            found=f"{type(sampler).__name__} for {type(model).__name__}",
            allowed=f"a lightrail.{wanted.__name__}",
            remedy="Samplers of images and points: dpm_solver_pp, unipc, ddim, …; of text: top_p, top_k, min_p, "
            "temperature, greedy.",
        )
    for each in resolved.chosen.get("sampler_wrapper", ()):
        sampler = make(resolved, each, {"sampler": sampler, "denoiser": model})
        if not isinstance(sampler, SamplerWrapper):
            raise CompositionError(
                f"sampler_wrapper '{each.name}' is not a lightrail.SamplerWrapper",
                found=type(sampler).__name__,
                allowed="a class that extends lightrail.SamplerWrapper",
                remedy="Leave it out, or let it extend lightrail.SamplerWrapper.",
            )
    return sampler


def _refuse_for_text(resolved: Resolved) -> None:
    for kind in ("sampler_wrapper", "time_grid", "guidance", "measurement"):
        for each in resolved.chosen.get(kind, ()):
            raise CompositionError(
                f"{kind} '{each.name}' has no meaning for a language model",
                found=f"{kind}={each.name}",
                allowed="a sampler of tokens alone",
                remedy=f"Leave {kind} out.",
            )


def device_of(accelerator: str, index: int = 0) -> torch.device:
    """The device that an accelerator's name means.

    Raises:
        CompositionError: It is not there.
    """
    import torch

    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    wanted = {"auto": found, "gpu": found if found != "cpu" else "cuda"}.get(accelerator, accelerator)
    if wanted != "cpu" and wanted != found:
        raise CompositionError(
            f"there is no {wanted} device here",
            found=f"generate.accelerator={accelerator}",
            allowed=f"auto, cpu{'' if found == 'cpu' else ', ' + found}",
            remedy="Set generate.accelerator=auto.",
        )
    return torch.device(wanted, index) if wanted == "cuda" else torch.device(wanted)
