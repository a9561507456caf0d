"""What a plugin says of itself, so that a composition can be checked before anything is spent.

A plugin declares its traits as a class attribute (or function attribute) named ``traits``; one without is taken to
need nothing. Suites, the resolver and the listing branch on traits only, never on names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Claim", "Peer", "SamplingClaim", "Traits", "traits_of"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper promises of its method, so that it can be measured.

    Args:
        sentence: The promise, in one line.
        baseline: The method of the same kind that it is compared with; for a transform the optimizer behind it, which
            is also the baseline when it is alone; a callback is compared with the run without it.
        margin: By how much, relative to the baseline's, the final loss may be higher and the promise kept: 0 where the
            promise is a lower loss, 0.02 where it is to be as good.
        steps: Where the promise is speed: the share of the baseline's passes after which its final loss is reached.
        problems: The plugins of the kind ``problem`` on which it is measured.
        options: Options under which it is measured, where the defaults do not fit a small problem.
        baseline_options: Those of the baseline.
        tuned: Whether learning rates are tried; ``None`` for all methods but those that set their own step size.
    """

    sentence: str
    baseline: str = "adamw"
    margin: float = 0.0
    steps: float | None = None
    problems: tuple[str, ...] = ("docs_lm", "digits")
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline_options: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool | None = None


@dataclass(frozen=True)
class SamplingClaim:
    """What a paper promises of samples, so that it can be measured by drawing some.

    Args:
        sentence: The promise, in one line.
        metric: What is compared: a metric of a generation, or its ``evaluations`` or ``sampling_seconds``.
        overrides: The generation that the promise is about, as typed after ``generate``; ``{NAME}`` stands for a run
            of ``trained``.
        baseline: The generation that it is compared with; ``None`` for the same without guidance.
        is_higher_better: Whether more of the metric keeps the promise.
        ratio: How much more, or less: the promise is kept where metric ≥ ratio · baseline (≤ where less is better).
        target: Where the metric should be; then what is compared is the distance from it, and less is better.
        trained: The runs that it needs, by name, each as typed after ``train``.
    """

    sentence: str
    metric: str
    overrides: tuple[str, ...]
    baseline: tuple[str, ...] | None = None
    is_higher_better: bool = True
    ratio: float = 1.0
    target: float | None = None
    trained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """The same method in another library, for a benchmark to measure beside.

    Args:
        target: The class, as ``module.Class``; a library that is not installed is left out.
        options: Those under which it does the same work.
    """

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The card of one plugin.

    Args:
        rule: The method in one line of mathematics.
        paper: Where it is from: authors, year, title, with an arXiv id or a DOI.
        state: Extra memory kept for each parameter, in copies of the parameters (AdamW: 2).
        extra_evaluations: Forward-backward passes a step beyond the first, averaged over steps; ``None`` where it
            depends on the model.
        needs_closure: Calls the closure itself, more than once or at other points, or needs the loss of the whole
            accumulation window.
        needs_second_derivatives: Calls ``closure.hvp``.
        needs_sampled_loss: Calls ``closure.sampled``; the task must offer ``sampled_loss``.
        needs_groups: Calls ``closure.groups``; the batch must be divisible.
        needs_clusters: Calls ``closure.clusters``; the task must offer ``clusters``.
        needs_objectives: Calls ``closure.jacobian``; the task must offer ``objectives``.
        needs_sample_losses: Calls ``closure.sample_losses``, ``weighted`` or ``sample_jacobian``; the task must offer
            ``sample_losses``.
        needs_outputs: Calls ``closure.outputs``; the task must offer ``outputs`` and ``output_loss``.
        needs_module: Is handed the module by ``attach`` and cannot work without it.
        watches_gradient: A schedule or batching whose ``observe(params, closure)`` is called once a step with the raw
            gradient in ``.grad``, before any transform.
        scales_with_gradient: Whether an update grows in proportion to the gradient (SGD), rather than being divided by
            its history (Adam, sign); ``None`` where nobody has said, and it can be measured.
        needs_per_sample_gradients: Needs one gradient a sample.
        fits_to_data: What a data module computes from all of its training data, in words ("scales columns by their
            means and deviations"), where that shapes what a model sees: no such number is private.
        needs_parameter_names: Is built from ``(name, parameter)`` pairs in place of bare parameters.
        needs_whole_tensors: Works on norms, matrices or vectors of whole tensors, which sharding would cut.
        sets_step_size: Chooses its own learning rate, so that a schedule would fight it.
        has_evaluation_point: Trains and evaluates at different parameters; offers ``eval()`` and ``train()``.
        is_stochastic: Draws random numbers of its own.
        order: Convergence order of a solver, once its history is filled.
        is_invertible: A sampler that can be run from data to noise.
        needs_predictions: The forms that a sampler asks of a model: data, noise, velocity, flow or score.
        fresh_noise: How much fresh noise a stochastic sampler's step draws, as the η of DDIM: 1 for that of the reverse
            diffusion; ``None`` where it is no such share.
        solves_reverse_diffusion: A sampler whose steps follow the score that they are told with fresh noise, so that
            the distribution of that score is kept.
        steps_from_newest: Whether a sampler's step starts at its newest state, rather than at one that it kept, so
            that moving the newest moves what follows.
        descends: Whether a sampler takes each step from one level of the grid to the next; a chain does not.
        example: Options under which the conformance suites build and run it.
        exceptions: Conformance checks that it does not pass, each with the reason.
        peers: The same method elsewhere, for ``lightrail bench optimizers``.
        claim: What its paper promises, for ``lightrail bench claims``.
        sampling_claims: What its paper promises of samples, for the same.
        verified: What of its paper's claims was measured here, one sentence each.
    """

    rule: str = ""
    paper: str = ""
    state: float | None = None
    extra_evaluations: float | None = 0.0
    needs_closure: bool = False
    needs_second_derivatives: bool = False
    needs_sampled_loss: bool = False
    needs_groups: bool = False
    needs_clusters: bool = False
    needs_objectives: bool = False
    needs_sample_losses: bool = False
    needs_outputs: bool = False
    needs_module: bool = False
    watches_gradient: bool = False
    scales_with_gradient: bool | None = None
    needs_per_sample_gradients: bool = False
    fits_to_data: str = ""
    needs_parameter_names: bool = False
    needs_whole_tensors: bool = False
    sets_step_size: bool = False
    has_evaluation_point: bool = False
    is_stochastic: bool = False
    order: int | None = None
    is_invertible: bool = False
    needs_predictions: tuple[str, ...] = ()
    fresh_noise: float | None = None
    solves_reverse_diffusion: bool = False
    steps_from_newest: bool = True
    descends: bool = True
    example: Mapping[str, Any] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    claim: Claim | None = None
    sampling_claims: tuple[SamplingClaim, ...] = ()
    verified: tuple[str, ...] = ()

    @property
    def evaluates_again(self) -> bool:
        """Whether the method asks its closure for more than the loss and gradient at the current point."""
        return (
            self.needs_closure
            or self.needs_second_derivatives
            or self.needs_sampled_loss
            or self.needs_groups
            or self.needs_clusters
            or self.needs_objectives
            or self.needs_sample_losses
            or self.needs_outputs
        )

    def to_dict(self) -> dict[str, Any]:
        """The traits that differ from the default, as plain values."""
        default = Traits()
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != getattr(default, f.name)
        }


def traits_of(plugin: object, options: Mapping[str, Any] | None = None) -> Traits:
    """The traits that a plugin declares; those of a plain method where it declares none.

    Args:
        plugin: A class or a function.
        options: Those it is to be built with. A plugin whose needs depend on them has a static method
            ``traits_under(options)`` beside ``traits``.
    """
    under = getattr(plugin, "traits_under", None)
    declared = under(options) if options and callable(under) else getattr(plugin, "traits", None)
    return declared if isinstance(declared, Traits) else Traits()
