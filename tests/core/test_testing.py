"""The suites can fail: a plugin that is wrong in one way fails the check of that way, and a right one passes all."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightrail import Closure, Traits
from lightrail.step.gradient_only import GradientOnly
from lightrail.testing import (
    NotApplicable,
    OptimizerSuite,
    Suite,
    examine,
)
from lightrail.testing.suite import name_of


def outcomes(suite: type[Suite], plugin: Any) -> dict[str, str]:
    return {name_of(check): examine(check, plugin).state for check in suite.checks}


def failures(suite: type[Suite], plugin: Any) -> set[str]:
    return {name for name, state in outcomes(suite, plugin).items() if state == "failed"}


class Right(Optimizer):
    """Momentum, written with care."""

    traits = Traits(rule="m = 0.9 m + g; x -= lr m", paper="made up", state=1, example={"lr": 0.02})

    def __init__(self, params: Any, lr: float = 0.02, maximize: bool = False, foreach: bool = False) -> None:
        super().__init__(params, {"lr": lr, "maximize": maximize, "foreach": foreach})

    def rate(self, group: dict[str, Any]) -> Any:
        return group["lr"]

    def sign(self, group: dict[str, Any]) -> int:
        return -1 if group["maximize"] else 1

    def gradient(self, p: Tensor) -> Tensor | None:
        return p.grad

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"].mul_(0.9).add_(gradient)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                gradient = self.gradient(p)
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise RuntimeError("sparse gradients are not taken")
                p.sub_(self.rate(group) * self.sign(group) * self.momentum(p, gradient))
        return loss


class Averages(Right):
    """Evaluates at the mean of its path."""

    traits = Traits(paper="made up", state=2, has_evaluation_point=True, example={"lr": 0.02})
    away: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p, state in self.state.items():
            state.setdefault("mean", p.clone()).lerp_(p, 0.1)
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        if self.away is None:
            self.away = {p: p.clone() for p in self.state}
            for p, state in self.state.items():
                p.copy_(state["mean"])

    @torch.no_grad()
    def train(self) -> None:
        for p, value in (self.away or {}).items():
            p.copy_(value)
        self.away = None


class LooksAhead(Right):
    """Takes the gradient a step ahead."""

    traits = Traits(paper="made up", state=1, needs_closure=True, extra_evaluations=1, example={"lr": 0.02})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not isinstance(closure, Closure):
            closure = GradientOnly(closure, [p for group in self.param_groups for p in group["params"]])
        loss = closure()
        ahead = [p if p.grad is None else p - 0.01 * self.sign(self.param_groups[0]) * p.grad for p in closure.params]
        with closure.at(ahead):
            closure()
        super().step()
        return loss


class SetsItsStepSize(Right):
    """Has no lr."""

    traits = Traits(paper="made up", state=1, sets_step_size=True)

    def __init__(self, params: Any) -> None:
        Optimizer.__init__(self, params, {"maximize": False})

    def rate(self, group: dict[str, Any]) -> Any:
        return 0.02


@pytest.mark.parametrize("plugin", [Right, Averages, LooksAhead, SetsItsStepSize])
def test_a_right_optimizer_passes_everything(plugin: Any) -> None:
    assert failures(OptimizerSuite, plugin) == set()


class KeepsReferences(Right):
    """Adds the last gradient, which it keeps by reference."""

    traits = Traits(paper="made up", state=1, example={"lr": 0.02})

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        last = self.state[p].get("last", torch.zeros_like(gradient))
        self.state[p]["last"] = gradient
        return gradient + last


class IgnoresMaximize(Right):
    """Goes down, whatever it is told."""

    def sign(self, group: dict[str, Any]) -> int:
        return 1


class EvaluatesTwice(Right):
    """Asks for the loss once more than its traits say."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if isinstance(closure, Closure):
            closure.loss()
        return loss


class CallsTwice(Right):
    """Calls its closure twice: under accumulation, Lightning's then adds a gradient to the gradient."""

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
        return super().step(closure)


class IgnoresItsGroup(Right):
    """Reads lr from its defaults."""

    def rate(self, group: dict[str, Any]) -> Any:
        return self.defaults["lr"]


class ForgetsItsState(Right):
    """Keeps momentum beside the state, so that a checkpoint loses it."""

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        kept = self.__dict__.setdefault("kept", {})
        kept[p] = 0.9 * kept.get(p, 0) + gradient
        return kept[p]


class SavesObjects(Right):
    """Has a state that is more than plain values."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "device": torch.Generator}


class ClimbsUp(Right):
    """Adds the gradient."""

    def sign(self, group: dict[str, Any]) -> int:
        return -super().sign(group)


class DrawsFromTheClock(Right):
    """Adds noise that no seed decides."""

    source = torch.Generator().manual_seed(0)

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        noise = torch.randn(gradient.shape, generator=self.source, dtype=torch.float64)
        return super().momentum(p, gradient) + 1e-3 * noise.to(p.dtype)


class SwallowsTypos(Right):
    """Takes any option."""

    def __init__(self, params: Any, lr: float = 0.02, **others: Any) -> None:
        super().__init__(params, lr)


class MovesWhatHasNoGradient(Right):
    """Takes a missing gradient for ones."""

    def gradient(self, p: Tensor) -> Tensor | None:
        return torch.ones_like(p) if p.grad is None else p.grad


class NeedsContiguous(Right):
    """Flattens with view."""

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        return super().momentum(p, gradient).view(-1).view(p.shape)


class NeedsMatrices(Right):
    """Has no answer to a scalar."""

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        return super().momentum(p, gradient) / gradient.shape[-1]


class NeedsEntries(Right):
    """Divides by the number of entries."""

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        return super().momentum(p, gradient) * (1 / p.numel())


class WidensItsState(Right):
    """Keeps momentum in single precision."""

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[p]
        wide = state["momentum"] = (0.9 * state.get("momentum", torch.zeros(p.shape)) + gradient).float()
        return wide.to(p.dtype)


class SaysTooLittle(Right):
    """Keeps one copy, and says none."""

    traits = Traits(paper="made up", state=0, example={"lr": 0.02})


class NamesNoPaper(Right):
    """Comes from nowhere."""

    traits = Traits(state=1, example={"lr": 0.02})


class SaysNothing(Right):
    # No docstring, on purpose.
    pass


class HasItsOwnForeach(Right):
    """Takes longer steps with foreach."""

    def rate(self, group: dict[str, Any]) -> Any:
        return group["lr"] * (1.1 if group["foreach"] else 1)


class ReturnsNothing(Right):
    """Keeps the loss to itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class CrashesOnSparse(Right):
    """Has not heard of sparse gradients."""

    def gradient(self, p: Tensor) -> Tensor | None:
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("Could not run 'aten::lerp_' with arguments from the 'SparseCPU' backend.")
        return p.grad


class TakesRealParts(Right):
    """Turns complex gradients over."""

    def momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        found = super().momentum(p, gradient)
        return -found if found.is_complex() else found


class ClaimsAPoint(Right):
    """Says that it has an evaluation point, and has none."""

    traits = Traits(paper="made up", state=1, has_evaluation_point=True, example={"lr": 0.02})

    def train(self) -> None: ...

    def eval(self) -> None: ...


class ClaimsItsStepSize(Right):
    """Says that it sets its step size, and follows lr."""

    traits = Traits(paper="made up", state=1, sets_step_size=True, example={"lr": 0.02})


class CopiesLr(Right):
    """Takes lr for a number of its own to change."""

    def rate(self, group: dict[str, Any]) -> Any:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(0.5)
        return group["lr"]


class NeedsMoreInSecret(Right):
    """Needs more than torch's closure, and does not say so."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p, product in zip(closure.params, closure.hvp(closure.params), strict=True):
            p.sub_(1e-6 * product)
        return loss


class DividesTheFirstGroup(Right):
    """Normalises by the size of the second group."""

    def rate(self, group: dict[str, Any]) -> Any:
        return group["lr"] / len(self.param_groups[-1]["params"])


class ExceptsATypo(Right):
    """Excuses a check that does not exist."""

    traits = Traits(paper="made up", state=1, example={"lr": 0.02}, exceptions={"is_fast": "it never is"})


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (KeepsReferences, {"keeps_no_gradient_by_reference", "set_to_none_makes_no_difference"}),
        (IgnoresMaximize, {"maximize_is_minimize_negated"}),
        (EvaluatesTwice, {"spends_the_evaluations_it_declares"}),
        (CallsTwice, {"spends_the_evaluations_it_declares", "is_the_same_under_lightning"}),
        (IgnoresItsGroup, {"takes_groups_with_own_lr", "follows_a_scheduler"}),
        (ForgetsItsState, {"resumes_exactly"}),
        (SavesObjects, {"resumes_exactly"}),
        (ClimbsUp, {"lowers_a_quadratic", "lowers_rosenbrock"}),
        (DrawsFromTheClock, {"is_deterministic"}),
        (SwallowsTypos, {"rejects_unknown_options"}),
        (MovesWhatHasNoGradient, {"takes_missing_gradients", "takes_no_gradient_at_all"}),
        (NeedsContiguous, {"takes_noncontiguous_parameters"}),
        (NeedsMatrices, {"takes_scalars_and_vectors"}),
        (NeedsEntries, {"takes_empty_tensors"}),
        (WidensItsState, {"keeps_state_in_parameter_dtype"}),
        (SaysTooLittle, {"declares_its_state_size"}),
        (NamesNoPaper, {"names_its_paper"}),
        (SaysNothing, {"is_documented"}),
        (HasItsOwnForeach, {"foreach_equals_loop"}),
        (ReturnsNothing, {"returns_the_loss"}),
        (CrashesOnSparse, {"takes_or_names_sparse_gradients"}),
        (TakesRealParts, {"takes_or_names_complex_gradients"}),
        (ClaimsAPoint, {"offers_its_evaluation_point"}),
        (ClaimsItsStepSize, {"follows_a_scheduler"}),
        (CopiesLr, {"takes_a_tensor_lr"}),
        (NeedsMoreInSecret, {"takes_or_refuses_a_plain_closure", "steps_without_a_closure"}),
        (DividesTheFirstGroup, {"takes_an_empty_group"}),
        (ExceptsATypo, {"excepts_known_checks"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_wrong_optimizer_fails_the_check_of_its_mistake(plugin: Any, expected: set[str]) -> None:
    by_name = {name_of(check): check for check in OptimizerSuite.checks}
    for name in expected:
        assert examine(by_name[name], plugin).state == "failed", f"{name} passes {plugin.__name__}"


class Excused(IgnoresMaximize):
    """Ignores maximize, and says so."""

    traits = Traits(paper="made up", state=1, example={"lr": 0.02}, exceptions={"maximize_is_minimize_negated": "why"})


class ExcusedForNothing(Right):
    """Does it right, and says that it does not."""

    traits = Excused.traits


def test_a_declared_exception_is_expected_to_fail_and_nothing_less() -> None:
    by_name = {name_of(check): check for check in OptimizerSuite.checks}
    check = by_name["maximize_is_minimize_negated"]
    assert (examine(check, Excused).state, examine(check, Excused).reason) == ("expected", "why")
    assert examine(check, ExcusedForNothing).state == "failed"


def test_a_subclass_runs_under_pytest_and_without() -> None:
    class TestSGD(OptimizerSuite):
        plugin = SGD
        options: ClassVar[dict[str, Any]] = {"lr": 0.05}

    assert {outcome.state for outcome in TestSGD.outcomes()} == {"passed", "skipped"}
    methods = {name for name in dir(TestSGD) if name.startswith("test_")}
    assert methods == {f"test_{name_of(check)}" for check in OptimizerSuite.checks}
    TestSGD().test_is_deterministic()  # type: ignore[attr-defined]


def test_a_suite_without_a_plugin_says_so() -> None:
    with pytest.raises(TypeError, match="plugin"):
        OptimizerSuite.outcomes()


def test_a_check_leaves_the_random_generators_alone() -> None:
    def check_draws(plugin: Any, options: Any) -> None:
        torch.rand(3)
        raise NotApplicable("it only draws")

    before = torch.get_rng_state()
    assert examine(check_draws, SGD).state == "skipped"
    assert torch.equal(torch.get_rng_state(), before)
