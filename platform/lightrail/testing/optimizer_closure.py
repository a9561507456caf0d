"""How an optimizer deals with its closure, with ``.grad``, with schedulers and with a second point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightrail.errors import ClosureError, UserError
from lightrail.testing.building import accepts, with_defaults
from lightrail.testing.optimizer_building import build, trajectory
from lightrail.testing.problems import Classifier
from lightrail.testing.runs import require_close, require_declared_evaluations, require_equal, run
from lightrail.testing.suite import Check, NotApplicable, require
from lightrail.traits import traits_of

__all__ = ["CHECKS"]

Options = Mapping[str, Any]


def check_keeps_no_gradient_by_reference(plugin: Any, options: Options) -> None:
    """What a loop writes into ``.grad`` after a step changes nothing: what is kept of a gradient is a copy."""
    expected = trajectory(plugin, options, Classifier(), steps=12)
    problem = Classifier()
    torch.manual_seed(3)
    optimizer = build(plugin, problem, options)
    for step in range(12):
        optimizer.step(problem.closure(problem.batch(step)))  # type: ignore[arg-type]
        for p in problem.params:
            if p.grad is not None:
                p.grad.fill_(1e3)
    require_equal(problem.snapshot(), expected, "overwriting .grad after a step changes the next; copy, do not refer")


def check_set_to_none_makes_no_difference(plugin: Any, options: Options) -> None:
    """``zero_grad(set_to_none=False)``, which reuses the tensors in ``.grad``, gives the same path."""
    if traits_of(plugin, options).evaluates_again:
        raise NotApplicable("its closure gives fresh gradients at every call")

    def path(set_to_none: bool) -> list[Tensor]:
        problem = Classifier()
        torch.manual_seed(3)
        optimizer = build(plugin, problem, options)
        for step in range(8):
            optimizer.step(problem.plain_closure(optimizer, step, set_to_none))  # type: ignore[arg-type]
        return problem.snapshot()

    require_equal(path(False), path(True), "set_to_none=False takes another path than set_to_none=True")


def check_steps_without_a_closure(plugin: Any, options: Options) -> None:
    """Gradients in ``.grad`` and ``step()`` is the same as ``step(closure)``; or it refuses, if it evaluates again."""
    expected = trajectory(plugin, options, Classifier(), steps=4)
    problem = Classifier()
    torch.manual_seed(3)
    optimizer = build(plugin, problem, options)
    try:
        for step in range(4):
            problem.plain_closure(optimizer, step)()
            optimizer.step()
    except ClosureError:
        require(traits_of(plugin, options).evaluates_again, "it needs a closure, and its traits do not say so")
        return
    require_equal(problem.snapshot(), expected, "step() is not step(closure)")


def check_takes_or_refuses_a_plain_closure(plugin: Any, options: Options) -> None:
    """torch's own closure is enough, or a ClosureError says what is missing, if its traits say that it needs more."""
    problem = Classifier()
    torch.manual_seed(3)
    optimizer = build(plugin, problem, options)
    try:
        for step in range(4):
            optimizer.step(problem.plain_closure(optimizer, step))  # type: ignore[arg-type]
    except ClosureError:
        require(
            traits_of(plugin, options).evaluates_again,
            "it needs more than torch's closure, and its traits do not say so",
        )
        return
    require(all(bool(p.isfinite().all()) for p in problem.params), "parameters became non-finite")
    if not traits_of(plugin, options).evaluates_again:
        expected = trajectory(plugin, options, Classifier(), steps=4)
        require_equal(problem.snapshot(), expected, "torch's closure and lightrail's take different paths")


def check_spends_the_evaluations_it_declares(plugin: Any, options: Options) -> None:
    """Under its defaults it spends ``1 + traits.extra_evaluations`` a step within a tenth; never two unannounced.

    The first step, in which a method may look around once, is left out of the average.
    """
    defaults = with_defaults(plugin, options)
    traits = traits_of(plugin, defaults)
    problem = Classifier()
    optimizer = build(plugin, problem, defaults)
    spent = []
    for step in range(31):
        closure = problem.closure(problem.batch(step))
        optimizer.step(closure)  # type: ignore[arg-type]
        spent.append(closure.evaluations)
    require_declared_evaluations(traits, spent)


def check_returns_the_loss(plugin: Any, options: Options) -> None:
    """``step(closure)`` returns the loss at the point where the step began."""
    problem = Classifier(torch.float64)
    optimizer = build(plugin, problem, options)
    for step in range(3):
        with torch.no_grad():
            expected = float(problem.loss(problem.batch(step)))
        found = optimizer.step(problem.closure(problem.batch(step)))  # type: ignore[arg-type]
        require(found is not None, "step(closure) returns None")
        require(
            abs(float(found) - expected) <= 1e-9, f"step(closure) returns {float(found):g}; the loss was {expected:g}"
        )


def check_is_the_same_under_lightning(plugin: Any, options: Options) -> None:
    """Under Lightning, with and without accumulation, it takes the path of a loop by hand, bit for bit."""
    from lightrail.testing.under_lightning import require_same_under_lightning

    require_same_under_lightning(
        lambda problem: build(plugin, problem, options), traits_of(plugin, options).evaluates_again
    )


def check_follows_a_scheduler(plugin: Any, options: Options) -> None:
    """A LambdaLR governs the step; a method that sets its own step size ignores or refuses it."""

    def path(factor: float) -> list[Tensor]:
        problem = Classifier()
        torch.manual_seed(3)
        optimizer = build(plugin, problem, options)
        scheduler = LambdaLR(optimizer, lambda step: factor**step)
        for step in range(4):
            run(problem, optimizer, 1, start=step)
            scheduler.step()
        return problem.snapshot()

    alone = trajectory(plugin, options, Classifier(), steps=4)
    if traits_of(plugin, options).sets_step_size:
        try:
            under = path(0.5)
        except (UserError, KeyError) as error:
            require(isinstance(error, UserError) or error.args == ("lr",), f"a scheduler crashes it: {error!r}")
            return
        require_equal(under, alone, "traits.sets_step_size says that it needs no schedule, but one changes its path")
        return
    require_equal(path(1.0), alone, "a scheduler that leaves lr as it is changes the path")
    halved = any(not torch.equal(a, b) for a, b in zip(path(0.5), alone, strict=True))
    require(halved, "a scheduler that halves lr each step has no effect: lr is not read from the group")


def check_takes_a_tensor_lr(plugin: Any, options: Options) -> None:
    """A 0-d tensor for lr gives the path of the same number, and is not changed by the steps."""
    if not accepts(plugin, "lr"):
        raise NotApplicable("the signature has no 'lr'")
    lr = build(plugin, Classifier(), options).param_groups[0].get("lr")
    if not isinstance(lr, float | int):
        raise NotApplicable("its groups have no number as lr")
    tensor = torch.tensor(lr, dtype=torch.float64)
    found = trajectory(plugin, {**options, "lr": tensor}, Classifier(torch.float64), steps=4)
    require(float(tensor) == lr, f"it changed the tensor that was given as lr from {lr:g} to {float(tensor):g}")
    expected = trajectory(plugin, {**options, "lr": lr}, Classifier(torch.float64), steps=4)
    require_close(found, expected, "lr as a tensor takes another path than lr as a number", 1e-9)


def check_offers_its_evaluation_point(plugin: Any, options: Options) -> None:
    """``eval()`` goes to the other point and ``train()`` comes back, bit for bit."""
    if not traits_of(plugin, options).has_evaluation_point:
        raise NotApplicable("it trains and evaluates at one point")
    problem = Classifier()
    optimizer: Any = build(plugin, problem, options)
    run(problem, optimizer, 5)
    training = problem.snapshot()
    optimizer.eval()
    evaluation = problem.snapshot()
    moved = any(not torch.equal(a, b) for a, b in zip(evaluation, training, strict=True))
    require(moved, "eval() does not move the parameters")
    optimizer.eval()
    require_equal(problem.snapshot(), evaluation, "a second eval() moves on")
    optimizer.train()
    require_equal(problem.snapshot(), training, "train() after eval() does not come back")
    optimizer.train()
    require_equal(problem.snapshot(), training, "a second train() moves on")


CHECKS: tuple[Check, ...] = (
    check_keeps_no_gradient_by_reference,
    check_set_to_none_makes_no_difference,
    check_steps_without_a_closure,
    check_takes_or_refuses_a_plain_closure,
    check_spends_the_evaluations_it_declares,
    check_returns_the_loss,
    check_is_the_same_under_lightning,
    check_follows_a_scheduler,
    check_takes_a_tensor_lr,
    check_offers_its_evaluation_point,
)
