"""AdvDiff: samples of a class that a classifier takes for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightrail.errors import CompositionError
from lightrail.generation import Denoiser, Generated, Guidance, Moment, Sampler, State
from lightrail.generation.guidance import Run
from lightrail.options import at_least, between, non_negative
from lightrail.traits import Traits
from lightrail_generation.guidance.classifier import labels_of
from lightrail_generation.guidance.judges import Classifier, LoadRun
from lightrail_generation.samplers.pndm import FPNDM, PLMS

__all__ = ["AdvDiff", "refuse_unmovable", "runner_up"]


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class that is not the true one, ``[B]``.

    Args:
        logits: ``[B, C]``, C at least 2.
        labels: The true classes, ``[B]``.

    Example:
        >>> runner_up(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1])).tolist()
        [2, 0]
    """
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def refuse_unmovable(sampler: Sampler, name: str) -> None:
    """Refuses a sampler that cannot go on where its states are moved between steps.

    Raises:
        CompositionError: Its states each have a level of their own, or it starts with a Runge-Kutta step, and would
            take one after every move.
    """
    solver = sampler.solver
    starts_slowly = isinstance(solver, FPNDM) or (isinstance(solver, PLMS) and solver.warmup != "adams")
    if not solver.card.descends or starts_slowly:
        raise CompositionError(
            f"{name} moves states between steps, and this sampler cannot go on from there",
            found=f"sampler {type(solver).__name__}",
            allowed="a sampler whose samples share a level, and whose first step is like any other",
            remedy="Choose +sampler=ddim, +sampler=dpm_solver_pp or +sampler=plms.",
        )


class AdvDiff(Guidance):
    """Draws samples of a class that a classifier takes for another, by two pushes.

    After each of the last steps x ← x + s ∇_x log p(ỹ | decode(x)); after a run that has not deceived the classifier
    x_T ← x_T + a ∇_{x_0} log p(ỹ | decode(x_0)), and the sampler runs again. ỹ is the likeliest wrong class.

    A sample stays as it was first taken for another class; those that never are stay as they were last. All run again
    as long as one has not succeeded, so the evaluations of a batch are those of the hardest sample in it; the samples
    themselves do not depend on it. The last step, to the data, is not followed by a push.

    Args:
        run: The run that trained the classifier to deceive (a folder, a checkpoint, or ``latest``), or
        function: a callable from samples in the user's units to logits ``[B, C]``, or its dotted path.
        label: The true class, at least 0; ``None`` for the one that each sample is conditioned on.
        scale: s, at least 0; 0 for no push of the states.
        start_scale: a, at least 0; 0 for a single run.
        runs: How often the sampler runs at most, at least 1.
        share: The last share of the steps that is pushed, in (0, 1]; at least one step before the last is.
        load_run: Loads a run.

    Raises:
        ConfigurationError: An option is out of range, or the classifier is not clear.
        CompositionError: No class is known, the classifier knows only one, or the sampler cannot go on from a moved
            state.
        PluginError: What the classifier answers is not finite, or not one row a sample.

    Deviations:
        The published code ends for the whole batch when any of its samples has succeeded, and returns those alone. Its
        two signatures set (s, a) to (2, 1) and (0.75, 0.5); the latter is the default here. Predictions of a moved
        state's past are forgotten, so that a multistep sampler is of first order where it is pushed.

    Example:
        >>> from lightrail.generation import GaussianMixture, sample
        >>> from lightrail_generation.samplers.ddim import DDIM
        >>> from lightrail_generation.time_grids.uniform_lambda import UniformLambda
        >>> mixture, sampler = GaussianMixture(), DDIM(steps=10)
        >>> attack = AdvDiff(function=lambda x: torch.stack((x[:, 0], -x[:, 0]), 1), label=0)
        >>> found = sample(mixture, sampler, sampler.grid(mixture.path, UniformLambda()), range(9), guidance=[attack])
        >>> found.evaluations, bool((found.x[:, 0] < 0).all())
        (10, True)

    Reference:
        X. Dai, K. Liang and B. Xiao (2023), AdvDiff: Generating Unrestricted Adversarial Examples using Diffusion
        Models, arXiv 2307.12499.
    """

    traits: ClassVar[Traits] = Traits(
        rule="x ← x + s ∇ log p(ỹ | x) in the last steps, x_T ← x_T + a ∇ log p(ỹ | x_0) between runs",
        paper="X. Dai, K. Liang, B. Xiao, 2023, AdvDiff: Generating Unrestricted Adversarial Examples using Diffusion "
        "Models, arXiv 2307.12499",
        example={"function": "torch.tanh", "label": 1, "runs": 2},
    )

    def __init__(
        self,
        run: str | None = None,
        function: str | Callable[[Tensor], Tensor] | None = None,
        label: int | None = None,
        scale: float = 0.75,
        start_scale: float = 0.5,
        runs: int = 10,
        share: float = 0.2,
        load_run: LoadRun | None = None,
    ) -> None:
        non_negative(scale=scale, start_scale=start_scale)
        at_least(0, label=0 if label is None else label)
        at_least(1, runs=runs)
        between(0, 1, closed="right", share=share)
        self.classifier = Classifier(run, function, load_run)
        self.label = label
        self.scale = scale
        self.start_scale = start_scale
        self.runs = runs if start_scale else 1
        self.share = share

    def prepare(self, denoiser: Denoiser, sampler: Sampler) -> None:
        refuse_unmovable(sampler, "AdvDiff")
        if not denoiser.classes and self.label is None:
            labels_of(None, 0, None, "AdvDiff")

    def is_active(self, moment: Moment) -> bool:
        """In the last steps but one."""
        left = moment.grid.steps - 1 - moment.index
        return self.scale != 0 and 0 < left <= max(1.0, self.share * moment.grid.steps + 1e-9)

    def after_step(self, state: State, moment: Moment) -> State:
        gradient, _ = self._push(state.x, moment)
        return dataclasses.replace(state, x=state.x + self.scale * gradient, history=())

    def around(self, run: Run, start: Tensor, moment: Moment) -> State:
        state, x_t = run(start), start
        found, is_done = state.x, torch.zeros(len(start), dtype=torch.bool, device=start.device)
        for _ in range(self.runs - 1):
            gradient, is_deceived = self._push(state.x, moment)
            is_done = is_done | is_deceived
            if bool(is_done.all()):
                break
            x_t = x_t + self.start_scale * gradient
            state = run(x_t)
            found = torch.where(is_done.view(-1, *[1] * (found.ndim - 1)), found, state.x)
        return dataclasses.replace(state, x=found)

    def _push(self, x: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """∇_x log p(ỹ | decode(x)), and whether the classifier is deceived already, ``[B]``."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.classifier(moment.denoiser.decode(x))
            labels = self._labels(moment.condition, logits)
            target = runner_up(logits, labels)
            values = logits.log_softmax(-1).gather(1, target[:, None])
            (gradient,) = torch.autograd.grad(values.sum(), x)
        return gradient, (logits.argmax(1) != labels).to(x.device)

    def _labels(self, condition: object, logits: Tensor) -> Tensor:
        labels = labels_of(condition, len(logits), self.label, "AdvDiff").to(logits.device)  # type: ignore[arg-type]
        if logits.shape[1] < 2 or int(labels.max()) >= logits.shape[1]:
            raise CompositionError(
                "there is no other class that the classifier could take a sample for",
                found=f"class {int(labels.max())}, and {logits.shape[1]} classes",
                allowed="a classifier of at least two classes, the true one among them",
                remedy="Choose a classifier of the same data as the model.",
            )
        return labels

    @torch.no_grad()
    def measure(self, generated: Generated) -> dict[str, float]:
        """``deceived``: the share of samples that the classifier takes for another class."""
        if self.label is None and "label" not in (generated.condition or {}):
            return {}
        logits = self.classifier(generated.samples)
        return {"deceived": float((logits.argmax(1) != self._labels(generated.condition, logits)).double().mean())}
