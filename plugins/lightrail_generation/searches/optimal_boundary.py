"""The optimal boundary condition: of many random starts, the one whose samples are nearest to known truths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightrail.catalogue import available, import_target
from lightrail.errors import CompositionError, ConfigurationError, PluginError
from lightrail.generation import Condition, Denoiser, sample
from lightrail.generation.search import Artefact, Report, Search, SearchProblem, silent
from lightrail.options import at_least, one_of
from lightrail.traits import Traits
from lightrail_generation.tasks.data_range import inputs_of, labels_of, training_batches

__all__ = ["OptimalBoundarySearch", "mean_absolute_error", "mean_squared_error"]

Distance = Callable[[Tensor, Tensor], Tensor]

REFERENCES = ("auto", "data", "model")
# Random starts whose mean distance is what a sampler has without the search.
RANDOM_STARTS = 32


def mean_squared_error(samples: Tensor, truths: Tensor) -> Tensor:
    """The mean of (x − truth)² over the elements, ``[B]``."""
    return (samples.double() - truths.double()).square().flatten(1).mean(1)


def mean_absolute_error(samples: Tensor, truths: Tensor) -> Tensor:
    """The mean of |x − truth| over the elements, ``[B]``."""
    return (samples.double() - truths.double()).abs().flatten(1).mean(1)


DISTANCES: dict[str, Distance] = {"mse": mean_squared_error, "mae": mean_absolute_error}


class OptimalBoundarySearch(Search):
    """Tries random starts and keeps the one whose samples are nearest to known truths on average.

    x_T* = argmin over K random x_T of (1/R) Σ_i d(h(x_T, c_i), truth_i)

    h is the sampler, c_i what steers the sample whose truth is known. ``guidance=[optimal_boundary]`` then starts every
    sample there.

    Args:
        candidates: K, at least 1.
        references: R, at least 1.
        distance: d: ``mse``, ``mae``, or the dotted path of a function from samples and truths ``[B, …]`` in the user's
            units to one number each.
        reference: ``data``, that the model was not trained on, of the class that is asked for where one is; ``model``,
            fine solutions from other starts under the same condition; or ``auto``, data where they are known.
        held_out: Other truths, for the scores in the table, at least 1.

    Raises:
        ConfigurationError: An option is out of range.
        CompositionError: The sampler draws noise of its own, or there are too few data.
        PluginError: The distance does not answer for each sample.

    Deviations:
        The paper takes LPIPS, which ``distance`` can name, and images with their measurements: a search knows no
        measurement, so that a truth belongs to a class, a prompt or to the data as a whole.

    Example:
        >>> from lightrail.generation import GaussianMixture
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler, times = GaussianMixture(), DDIM(steps=4), UniformLambda()
        >>> problem = SearchProblem(mixture, sampler, times, sampler.grid(mixture.path, times))
        >>> found = OptimalBoundarySearch(candidates=32, references=16, held_out=16).search(problem)
        >>> found.after["distance"] < found.before["distance"]
        True

    Reference:
        Y. Ma, H. Yang, W. Yang, J. Fu and J. Liu (2024), Solving Diffusion ODEs with Optimal Boundary Conditions for
        Better Image Super-Resolution, arXiv 2305.15357, section 3.3.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x_T* = argmin over random x_T of (1/R) Σ d(h(x_T, c_i), truth_i)",
        paper="Y. Ma, H. Yang, W. Yang, J. Fu, J. Liu, 2024, Solving Diffusion ODEs with Optimal Boundary Conditions "
        "for Better Image Super-Resolution, arXiv 2305.15357",
        example={"candidates": 8, "references": 4, "held_out": 4},
    )

    replaces: ClassVar[tuple[str, ...]] = ("guidance",)

    def __init__(
        self,
        candidates: int = 256,
        references: int = 64,
        distance: str | Distance = "mse",
        reference: str = "auto",
        held_out: int = 64,
    ) -> None:
        at_least(1, candidates=candidates, references=references, held_out=held_out)
        one_of(REFERENCES, reference=reference)
        self.candidates = candidates
        self.references = references
        self.distance = _distance(distance)
        self.reference = reference
        self.held_out = held_out

    @torch.no_grad()
    def search(self, problem: SearchProblem, report: Report = silent) -> Artefact:
        problem.refuse_stochastic("optimal_boundary")
        # The truths' own noise, where they are drawn, is not that of a candidate.
        first = self.candidates
        indices = range(first, first + self.references + self.held_out)
        truths = self._truths(problem, indices)
        known, unseen = list(indices[: self.references]), list(indices[self.references :])
        starts = problem.starts(range(self.candidates))
        distances = self._distances(problem, starts, known, truths[: self.references], report)
        best = int(distances.argmin())
        others = problem.starts(range(indices[-1] + 1, indices[-1] + 1 + RANDOM_STARTS))
        scored = torch.cat((starts[best : best + 1], others))
        after, *before = self._distances(problem, scored, unseen, truths[self.references :]).tolist()
        values: dict[str, Any] = {
            "start": (starts[best] / problem.denoiser.path.starting_scale(problem.grid[0])).cpu(),
            "candidate": best,
            "distance": float(distances[best]),
            "truths": truths[self.references :].cpu(),
            "labels": _labels(problem.condition_of(unseen)),
        }
        before_and_after = {"distance": sum(before) / len(before)}, {"distance": after}
        return Artefact("optimal_boundary", problem.key(), values, *before_and_after)

    def _distances(
        self, problem: SearchProblem, starts: Tensor, indices: Sequence[int], truths: Tensor, report: Report = silent
    ) -> Tensor:
        """The mean distance of what becomes of each start from the truths, ``[S]``."""
        total = starts.new_zeros(len(starts), dtype=torch.float64)
        groups = _groups(problem.condition_of(indices), len(indices))
        for number, members in enumerate(groups):
            samples = torch.cat(list(_sampled(problem, starts, indices[members[0]])))
            for member in members:
                total += self._of(samples, truths[member])
            report(number + 1, len(groups), float(total.min()) / sum(map(len, groups[: number + 1])))
        return total / len(truths)

    def _of(self, samples: Tensor, truth: Tensor) -> Tensor:
        found = self.distance(samples, truth.to(samples.device, samples.dtype).expand_as(samples))
        if not isinstance(found, Tensor) or found.shape != (len(samples),) or not bool(found.isfinite().all()):
            raise PluginError(
                "the distance does not answer for each sample",
                found=f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}",
                allowed=f"finite numbers, one for each of {len(samples)} samples",
                remedy="Let it return a tensor [B] for samples and truths [B, …].",
            )
        return found.double()

    def _truths(self, problem: SearchProblem, indices: range) -> Tensor:
        """In the user's units, ``[R, …]``."""
        found = None if self.reference == "model" else _data(problem.denoiser, problem.condition_of(indices), indices)
        if found is not None:
            return found
        if self.reference == "data":
            raise CompositionError(
                "there are too few data for the reference",
                found=f"fewer than {len(indices)} that the model was not trained on, of the classes that are asked for",
                allowed="a trained run with data of those classes, or reference=model",
                remedy="Set search.references and search.held_out lower, or search.reference=model.",
            )
        return problem.denoiser.decode(problem.solution(indices)[-1])

    def words(self, artefact: Artefact, path: str) -> list[str]:
        known = set(available("guidance"))
        steering = artefact.key["condition"].get("steered_by", ())
        kept = [each for each in steering if each["name"] in known]
        names = ",".join([*(each["name"] for each in kept), "optimal_boundary"])
        options = [
            f"guidance.{each['name']}.{option}={value if isinstance(value, str) else json.dumps(value)}"
            for each in kept
            for option, value in each["options"].items()
        ]
        return [f"+guidance=[{names}]", *options, f"guidance.optimal_boundary.path={path}"]


def _sampled(problem: SearchProblem, starts: Tensor, index: int) -> Iterator[Tensor]:
    """What becomes of the starts under the condition of one index, in the user's units, batch by batch."""
    for begin in range(0, len(starts), problem.batch_size):
        batch = starts[begin : begin + problem.batch_size]
        numbers = range(begin, begin + len(batch))
        condition = problem.condition_of([index] * len(batch))
        steered = {"condition": condition, "guidance": problem.guidance, "start": batch}
        found = sample(problem.denoiser, problem.sampler, problem.grid, numbers, seed=problem.seed, **steered)
        yield problem.denoiser.decode(found.x)


def _groups(condition: Condition | None, count: int) -> list[list[int]]:
    """Rows that are steered alike, which a start makes the same sample of."""
    rows: dict[Any, list[int]] = {}
    tensors = [value for value in (condition or {}).values() if isinstance(value, Tensor) and value.ndim]
    for row in range(count):
        key = tuple(tuple(tensor[row].flatten().tolist()) for tensor in tensors)
        rows.setdefault(key, []).append(row)
    return list(rows.values())


def _labels(condition: Condition | None) -> Tensor | None:
    found = None if condition is None else condition.get("label")
    return found.cpu() if isinstance(found, Tensor) and found.ndim == 1 else None


def _data(denoiser: Denoiser, condition: Condition | None, indices: range) -> Tensor | None:
    """One for each index, of its class where it has one; ``None`` where there are not as many."""
    if condition is None:
        try:
            found = denoiser.examples(len(indices))
        except CompositionError:
            return None
        return found if len(found) == len(indices) else None
    labels, data = _labels(condition), getattr(denoiser, "data", None)
    if data is None or labels is None or set(condition) != {"label"}:
        return None
    wanted: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        wanted.setdefault(label, []).append(place)
    chosen: dict[int, Tensor] = {}
    data.prepare_data()
    data.setup("fit")
    for batch in training_batches(data.val_dataloader() or data.train_dataloader()):
        classes = labels_of(batch)
        if classes is None:
            return None
        for x, label in zip(inputs_of(batch), classes.tolist(), strict=True):
            if wanted.get(label):
                chosen[wanted[label].pop(0)] = x
    return torch.stack([chosen[place] for place in range(len(labels))]) if len(chosen) == len(labels) else None


def _distance(distance: str | Distance) -> Distance:
    if isinstance(distance, str) and distance in DISTANCES:
        return DISTANCES[distance]
    found = import_target(distance) if isinstance(distance, str) and "." in distance else distance
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise ConfigurationError(
            "the distance cannot be called",
            found=f"distance={distance}",
            allowed="mse, mae, or the dotted path of a function of samples and truths",
            remedy="Set search.distance to one of those.",
        )
    return cast("Distance", found)
