"""Conformance of gradient transforms, each around two optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from lightrail.errors import ClosureError
from lightrail.step.transform import Transform, TransformedOptimizer
from lightrail.testing.building import (
    check_is_documented,
    check_names_its_paper,
    missing_options,
    refuses_unknown_options,
    with_defaults,
)
from lightrail.testing.problems import Classifier, Linear, NormalisedClassifier, Problem
from lightrail.testing.runs import require_close, require_declared_evaluations, require_equal, run, saved_and_loaded
from lightrail.testing.suite import Check, NotApplicable, Suite, known_exceptions, name_of, require
from lightrail.traits import traits_of

__all__ = ["TransformSuite"]

Options = Mapping[str, Any]
Inner = Callable[[list[Tensor]], Optimizer]


def _sgd(params: list[Tensor]) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9)


def _adamw(params: list[Tensor]) -> Optimizer:
    return AdamW(params, lr=0.01)


INNER: dict[str, Inner] = {"SGD": _sgd, "AdamW": _adamw}


def _around(inner: Inner, problem: Problem, *transforms: Transform) -> TransformedOptimizer:
    for transform in transforms:
        transform.attach(problem.module)
    torch.manual_seed(3)
    return TransformedOptimizer(inner(problem.params), transforms)


def check_builds_from_options(plugin: Any, options: Options) -> None:
    """``plugin(**options)`` is a Transform that acts somewhere: on weights, groups, the gradient or the update."""
    missing = missing_options(plugin, options, given=0)
    require(not missing, f"options without a default are not in traits.example: {missing}")
    transform = plugin(**options)
    require(isinstance(transform, Transform), f"it is no lightrail.Transform but {type(transform).__name__}")
    acts = ("attach", "prepare", "before_step", "after_step")
    is_one = any(getattr(type(transform), name) is not getattr(Transform, name) for name in acts)
    require(is_one, f"it overrides none of {', '.join(acts)}")


def check_rejects_unknown_options(plugin: Any, options: Options) -> None:
    """An option that the signature lacks is an error."""
    refuses_unknown_options(plugin, options)


def check_changes_the_path(plugin: Any, options: Options) -> None:
    """With its example options it changes where each optimizer goes: never a silent no-op."""
    for name, inner in INNER.items():
        bare, changed = Classifier(), Classifier()
        without = run(bare, _around(inner, bare), 6)
        found = run(changed, _around(inner, changed, plugin(**options)), 6)
        require(all(bool(p.isfinite().all()) for p in found), f"around {name} parameters became non-finite")
        moved = any(not torch.equal(a, b) for a, b in zip(found, without, strict=True))
        require(moved, f"around {name} six steps end where they end without it, bit for bit")


def check_is_deterministic(plugin: Any, options: Options) -> None:
    """The same seed gives the same parameters, bit for bit."""
    for name, inner in INNER.items():
        ends = []
        for _ in range(2):
            problem = Classifier()
            ends.append(run(problem, _around(inner, problem, plugin(**options)), 8))
        require_equal(ends[1], ends[0], f"around {name} two runs from one seed differ")


def check_resumes_exactly(plugin: Any, options: Options) -> None:
    """Saved in mid-run, through a file of plain values, and loaded: it ends where the uninterrupted run ends."""
    for name, inner in INNER.items():
        problem = Classifier()
        optimizer = _around(inner, problem, plugin(**options))
        middle = run(problem, optimizer, 7)
        checkpoint = saved_and_loaded(optimizer.state_dict())
        random_state = torch.get_rng_state()
        expected = run(problem, optimizer, 7, start=7)

        resumed = Classifier()
        optimizer = _around(inner, resumed, plugin(**options))
        with torch.no_grad():
            torch._foreach_copy_(resumed.params, middle)
        optimizer.load_state_dict(checkpoint)
        torch.set_rng_state(random_state)
        found = run(resumed, optimizer, 7, start=7)
        require_equal(found, expected, f"around {name} a resumed run differs from the uninterrupted one")


def check_is_exact_under_accumulation(plugin: Any, options: Options) -> None:
    """Two micro-batches are the one batch that they make, to rounding."""
    traits = traits_of(plugin, options)
    if traits.needs_groups or traits.needs_sampled_loss or traits.needs_objectives:
        raise NotApplicable("it divides or samples the batch, and two micro-batches divide otherwise")
    for name, inner in INNER.items():
        whole, halved = Classifier(torch.float64), Classifier(torch.float64)
        expected = run(whole, _around(inner, whole, plugin(**options)), 5)
        optimizer = _around(inner, halved, plugin(**options))
        for step in range(5):
            inputs, targets = halved.batch(step)
            parts = zip(inputs.chunk(2), targets.chunk(2), strict=True)
            optimizer.step(halved.closure(*parts))
        require_close(halved.snapshot(), expected, f"around {name} two micro-batches are not one batch", 1e-6)


def check_returns_to_the_point(plugin: Any, options: Options) -> None:
    """After ``before_step`` the parameters are where they were, bit for bit, with gradients of their dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = Classifier(dtype)
        transform = plugin(**options)
        transform.attach(problem.module)
        for step in range(3):
            closure = problem.closure(problem.batch(step))
            closure()
            before = problem.snapshot()
            with torch.no_grad():
                transform.before_step(closure.params, closure)
            require_equal(problem.snapshot(), before, "before_step leaves the parameters elsewhere")
            for p in problem.params:
                require(p.grad is not None and p.grad.dtype == dtype, "before_step drops or recasts a gradient")
                require(p.grad is not None and p.grad.shape == p.shape, "before_step changes the shape of a gradient")


def check_spends_the_evaluations_it_declares(plugin: Any, options: Options) -> None:
    """Under its defaults it spends ``1 + traits.extra_evaluations`` a step within a tenth; never two unannounced.

    The first step, in which a method may look around once, is left out of the average.
    """
    defaults = with_defaults(plugin, options)
    problem = Classifier()
    optimizer = _around(_sgd, problem, plugin(**defaults))
    spent = []
    for step in range(31):
        closure = problem.closure(problem.batch(step))
        optimizer.step(closure)
        spent.append(closure.evaluations)
    require_declared_evaluations(traits_of(plugin, defaults), spent)


def check_takes_or_refuses_a_plain_closure(plugin: Any, options: Options) -> None:
    """torch's own closure is enough, or a ClosureError says what is missing, if its traits say that it needs more."""
    problem = Classifier()
    optimizer = _around(_sgd, problem, plugin(**options))
    try:
        for step in range(3):
            optimizer.step(problem.plain_closure(optimizer, step))
    except ClosureError:
        require(
            traits_of(plugin, options).evaluates_again,
            "it needs more than torch's closure, and its traits do not say so",
        )


def check_takes_any_parameters(plugin: Any, options: Options) -> None:
    """Scalars, empty tensors, missing gradients, frozen and transposed parameters are fine."""
    for inner in INNER.values():
        generator = torch.Generator().manual_seed(5)
        shapes = {"scalar": (), "vector": (5,), "matrix": (4, 3), "hollow": (0, 3), "unused": (2,), "frozen": (2, 2)}
        values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        values["turned"] = torch.randn(3, 4, generator=generator, dtype=torch.float64).t()
        problem = Linear(values, frozen=["frozen"])
        problem.skip = {"unused"}
        before = dict(zip(values, problem.snapshot(), strict=True))
        after = dict(zip(values, run(problem, _around(inner, problem, plugin(**options)), 4), strict=True))
        for name, p in after.items():
            require(bool(p.isfinite().all()), f"the {name} parameter became non-finite")
            if name in ("unused", "frozen"):
                require(torch.equal(p, before[name]), f"the {name} parameter had no gradient, and yet it moved")


def check_moves_masks_and_statistics_once(plugin: Any, options: Options) -> None:
    """Dropout masks are drawn and BatchNorm statistics move once a step, however often it evaluates."""
    traits = traits_of(plugin, options)
    bare, changed = NormalisedClassifier(), NormalisedClassifier()
    run(bare, _around(_sgd, bare), 1)
    random_state = torch.get_rng_state()
    run(changed, _around(_sgd, changed, plugin(**options)), 1)
    buffers = dict(changed.module.named_buffers())
    for name, expected in bare.module.named_buffers():
        require(torch.equal(buffers[name], expected), f"one step moves the statistic '{name}' otherwise than once")
    if not (traits.is_stochastic or traits.needs_sampled_loss):
        require(torch.equal(torch.get_rng_state(), random_state), "one step draws random numbers beyond the masks")


def check_is_the_same_under_lightning(plugin: Any, options: Options) -> None:
    """Under Lightning, with and without accumulation, it takes the path of a loop by hand, bit for bit."""
    from lightrail.testing.under_lightning import require_same_under_lightning

    for inner in INNER.values():
        require_same_under_lightning(
            lambda problem, inner=inner: _around(inner, problem, plugin(**options)), evaluates_again=True
        )


CHECKS: tuple[Check, ...] = (
    check_is_documented,
    check_names_its_paper,
    check_builds_from_options,
    check_rejects_unknown_options,
    check_changes_the_path,
    check_is_deterministic,
    check_resumes_exactly,
    check_is_exact_under_accumulation,
    check_returns_to_the_point,
    check_spends_the_evaluations_it_declares,
    check_takes_or_refuses_a_plain_closure,
    check_takes_any_parameters,
    check_moves_masks_and_statistics_once,
    check_is_the_same_under_lightning,
)


class TransformSuite(Suite):
    """Every check of a gradient transform."""

    kind: ClassVar[str] = "transform"
    checks: ClassVar[tuple[Check, ...]] = (*CHECKS, known_exceptions(frozenset(map(name_of, CHECKS))))
