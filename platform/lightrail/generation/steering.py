"""What steers a generation: guidance, and what was measured of the samples that are sought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightrail.errors import CompositionError
from lightrail.generation.chosen import made
from lightrail.generation.denoiser import Denoiser
from lightrail.generation.guidance import Guidance
from lightrail.generation.measurement import Measurement
from lightrail.generation.observing import sample_shape
from lightrail.generation.sampler import Sampler
from lightrail.generation.trained_run import TrainedRun

if TYPE_CHECKING:
    from lightrail.run.resolve import Resolved

__all__ = ["chosen_guidance", "chosen_measurement", "refuse_what_is_not_read"]


def refuse_what_is_not_read(request: Mapping[str, Any], guidance: Sequence[Guidance], is_measured: bool) -> None:
    """Refuses words that nothing would come of.

    Args:
        request: The ``generate`` group.
        guidance: The chain.
        is_measured: Whether a measurement was chosen.

    Raises:
        CompositionError: There are some.
    """
    if guidance and request.get("invert") is not None:
        raise CompositionError(
            "samples are run back to noise without guidance",
            found=f"generate.invert={request['invert']} with {type(guidance[0]).__name__}",
            allowed="generate.invert with a sampler alone",
            remedy="Leave guidance out.",
        )
    files = [name for name in ("image", "observed") if request.get(name) is not None]
    if len(files) > 1 or (files and not is_measured):
        raise CompositionError(
            "it is not clear what was measured" if is_measured else "an image is given, and nothing measures it",
            found=" and ".join(f"generate.{name}={request[name]}" for name in files),
            allowed="generate.image or generate.observed, together with generate.measurement",
            remedy="Leave one of them out."
            if is_measured
            else "Say how it is measured, and by what it steers: generate.measurement=inpaint '+guidance=[dds]'.",
        )


def chosen_guidance(
    resolved: Resolved, model: Denoiser, sampler: Sampler, load_run: Callable[[str], TrainedRun]
) -> tuple[Guidance, ...]:
    """The chain of guidance, in order, each of which has seen the model and the solver.

    Args:
        resolved: What was chosen.
        model: What is sampled.
        sampler: The solver, inside its wrappers.
        load_run: Loads another run, for guidance that needs one.

    Raises:
        CompositionError: One is no guidance, or cannot steer these.
    """
    from lightrail.run.build import make

    chain = []
    for each in resolved.chosen.get("guidance", ()):
        guidance = make(resolved, each, {"load_run": load_run})
        if not isinstance(guidance, Guidance):
            raise CompositionError(
                f"guidance '{each.name}' is not a lightrail.Guidance",
                found=type(guidance).__name__,
                allowed="a class that extends lightrail.Guidance",
                remedy="Leave it out, or let it extend lightrail.Guidance.",
            )
        guidance.prepare(model, sampler)
        chain.append(guidance)
    return tuple(chain)


def chosen_measurement(resolved: Resolved, model: Denoiser, guidance: Sequence[Guidance]) -> Measurement | None:
    """What is measured, checked: only where it is read, and only with an adjoint that is one.

    Args:
        resolved: What was chosen.
        model: What is sampled.
        guidance: The chain that may read it.

    Raises:
        CompositionError: One of the two is there without the other, or it does not fit the samples.
        PluginError: Its adjoint is none.
    """
    readers = [type(each).__name__ for each in guidance if each.needs_measurement]
    chosen = resolved.one("measurement")
    if (chosen is None) == bool(readers):
        raise CompositionError(
            f"{readers[0]} steers towards what was measured, and nothing was"
            if readers
            else "what is measured steers nothing",
            found="no measurement" if chosen is None else f"measurement={chosen.name}",
            allowed="a measurement together with guidance that reads it (dds, dps, mpgd, …)",
            remedy="Choose one: generate.measurement=inpaint."
            if readers
            else "Add guidance that reads it: '+guidance=[dds]'.",
        )
    if chosen is None:
        return None
    measurement: Measurement = made(resolved, "measurement", Measurement)
    shape = sample_shape(model)
    measurement.prepare(shape)
    measurement.check_adjoint(shape)
    return measurement
