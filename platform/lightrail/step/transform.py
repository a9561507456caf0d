"""Gradient transforms, and the optimizer that carries a chain of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrail.step.closure import QUESTIONS, Closure
from lightrail.step.gradient_only import GradientOnly
from lightrail.traits import Traits

__all__ = ["CombinedOptimizer", "Observer", "Transform", "TransformedOptimizer", "has_evaluation_point"]


class Transform:
    """What acts between the gradient and the update.

    Subclass it and override one or both methods. Options are the arguments of ``__init__``. A transform that evaluates
    again (``closure.at``, ``closure.hvp``, …) says so in its ``traits``.

    Transforms chain as functions do: in ``[clip, sam]``, SAM asks a closure whose gradients are already clipped; in
    ``[sam, clip]``, what SAM found is clipped.

    Example:
        >>> class Sign(Transform):
        ...     def before_step(self, params, closure):
        ...         for p in params:
        ...             if p.grad is not None:
        ...                 p.grad.sign_()
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.5), [Sign()])
        >>> loss = optimizer.step(Closure(lambda: (w ** 2).sum(), [w]))
        >>> w.item()
        2.5
    """

    traits: ClassVar[Traits] = Traits()

    is_repeated: bool = False
    """Whether ``before_step`` is called again within one step, by a method behind that evaluates elsewhere; state that
    moves once a step (a counter, a moving average, a multiplier) moves where this is false."""

    def attach(self, module: nn.Module) -> None:
        """Called once, when the module's first weights are drawn and before there is an optimizer.

        What a transform does to weights here is done before a checkpoint is loaded, so it happens once in the life of
        a run. In a loop of your own, call it yourself.

        Args:
            module: The LightningModule, or the model of a plain loop.
        """

    def prepare(self, optimizer: Optimizer) -> None:
        """Called once, when the optimizer is made and before it has state; may divide ``param_groups``.

        Args:
            optimizer: The optimizer inside, whose learning rates no schedule has touched yet.
        """

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        """Edits ``.grad`` in place, or puts new tensors there. ``.grad`` may be ``None``.

        Args:
            params: The parameters, in the order of the optimizer's groups.
            closure: What this transform may ask: the loss as every transform before it sees it.
        """

    def after_step(self, params: list[Tensor], previous: list[Tensor]) -> None:
        """Edits the update in place, after the optimizer made it.

        Args:
            params: The parameters after the update.
            previous: Copies of them from before it.
        """

    def eval(self, params: list[Tensor]) -> None:
        """Moves the parameters to the point to be evaluated, for one whose traits have ``has_evaluation_point``.

        Called where they may be there already.
        """

    def train(self, params: list[Tensor]) -> None:
        """Moves them back to the point that training goes on from."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""

    def logged(self) -> dict[str, float]:
        """Figures of the last step that are worth a curve in the report; read at logging steps only."""
        return {}


class _TransformedClosure(Closure):
    """A closure whose gradient has passed through one transform; other answers are the inner closure's own."""

    def __init__(self, inner: Closure, transform: Transform) -> None:
        self._inner = inner
        self._transform = transform
        self._is_asked = False

    @property
    def params(self) -> list[Tensor]:  # type: ignore[override]
        return self._inner.params

    @property
    def evaluations(self) -> float:  # type: ignore[override]
        return self._inner.evaluations

    def __call__(self) -> Tensor:
        loss = self._inner()
        self._transform.is_repeated, self._is_asked = self._is_asked, True
        with torch.no_grad():
            self._transform.before_step(self.params, self._inner)
        return loss

    @contextmanager
    def at(self, points: Sequence[Tensor]) -> Iterator[Closure]:
        with self._inner.at(points):
            yield self

    @contextmanager
    def part(self, index: int, count: int) -> Iterator[Closure]:
        with self._inner.part(index, count):
            yield self

    @contextmanager
    def turn(self, player: str) -> Iterator[Closure]:
        with self._inner.turn(player):
            yield self


def _passed_on(question: str) -> Callable[..., Any]:
    return lambda self, *args, **options: getattr(self._inner, question)(*args, **options)


for _question in QUESTIONS:
    setattr(_TransformedClosure, _question, _passed_on(_question))


Observer = Callable[[list[Tensor], Closure], None]


class _ObservedClosure(_TransformedClosure):
    """The innermost closure: who watches the raw gradient of each step sees it before any transform."""

    def __init__(self, inner: Closure, observers: Sequence[Observer]) -> None:
        super().__init__(inner, Transform())
        self._observers = observers
        self._is_seen = False

    def __call__(self) -> Tensor:
        loss = self._inner()
        if not self._is_seen:
            self._is_seen = True
            for observe in self._observers:
                observe(self.params, self._inner)
        return loss


class _FinishedClosure(_TransformedClosure):
    """The outermost closure: what a loop does to the finished gradient (its hooks, its clipping) comes here."""

    def __init__(self, inner: Closure, finish: Callable[[], None]) -> None:
        super().__init__(inner, Transform())
        self._finish = finish

    def __call__(self) -> Tensor:
        loss = self._inner()
        self._finish()
        return loss


class _View(Optimizer):
    """An optimizer that owns no groups and no state, only optimizers that do.

    ``Optimizer.__init__`` is not called, on purpose: it would make a second set of groups.
    """

    @property
    def params(self) -> list[Tensor]:
        """Every parameter, in the order of the groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.params:
            if p.grad is None:
                continue
            if set_to_none:
                p.grad = None
            else:
                p.grad.detach_().zero_()


class TransformedOptimizer(_View):
    """An optimizer with a chain of gradient transforms in front of it.

    Its ``param_groups`` and ``state`` are the optimizer's own, so schedules and checkpoints need not know of it.

    Args:
        optimizer: Any torch optimizer.
        transforms: In the order in which they act on the gradient.
    """

    def __init__(self, optimizer: Optimizer, transforms: Sequence[Transform] = ()) -> None:
        self.optimizer = optimizer
        self.transforms = list(transforms)
        # Set by a loop that owns the accumulation window; it then takes the place of the closure given to `step`.
        self.window: Closure | None = None
        self.finish: Callable[[], None] | None = None
        # Schedules and batchings that look at the raw gradient, `(params, closure)`, once a step.
        self.observers: list[Observer] = []
        for transform in self.transforms:
            transform.prepare(optimizer)
        self._edits_update = [t for t in self.transforms if type(t).after_step is not Transform.after_step]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure`; torch's own closure, or ``None`` with gradients in ``.grad``,
                serves transforms that evaluate once.

        Returns:
            The loss at the point where the step began.
        """
        params = self.params
        oracle = self.window
        if oracle is None:
            oracle = closure if isinstance(closure, Closure) else GradientOnly(closure, params)
        if self.observers:
            oracle = _ObservedClosure(oracle, self.observers)
        for transform in self.transforms:
            oracle = _TransformedClosure(oracle, transform)
        if self.finish is not None:
            oracle = _FinishedClosure(oracle, self.finish)
        previous = [p.detach().clone() for p in params] if self._edits_update else []
        loss = self.optimizer.step(oracle)  # type: ignore[arg-type]
        for transform in self._edits_update:
            transform.after_step(params, previous)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "transforms": [transform.state_dict() for transform in self.transforms],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for transform, state in zip(self.transforms, state_dict["transforms"], strict=True):
            transform.load_state_dict(state)

    @property
    def has_evaluation_point(self) -> bool:
        """Whether the optimizer or a transform trains and evaluates at different points."""
        return has_evaluation_point(self.optimizer) or any(_has_point(each) for each in self.transforms)

    def train(self) -> None:
        """Goes to the point where gradients are taken, for a method that has two."""
        # In the order opposite to that of `eval`.
        for transform in filter(_has_point, reversed(self.transforms)):
            transform.train(self.params)
        if has_evaluation_point(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Goes to the point that is to be evaluated, for a method that has two."""
        if has_evaluation_point(self.optimizer):
            self.optimizer.eval()  # type: ignore[attr-defined]
        for transform in filter(_has_point, self.transforms):
            transform.eval(self.params)


def _has_point(transform: Transform) -> bool:
    return type(transform).eval is not Transform.eval


def has_evaluation_point(optimizer: Any) -> bool:
    """Whether an optimizer trains and evaluates at different points, between which ``train()`` and ``eval()`` move."""
    own = getattr(optimizer, "has_evaluation_point", None)
    if isinstance(own, bool):
        return own
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


class _JoinedState(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one mapping; each key is read and written where its parameter lives."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _home(self, key: Tensor) -> Any:
        for optimizer in self._optimizers:
            if any(key is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(key)

    def __getitem__(self, key: Tensor) -> Any:
        return self._home(key)[key]

    def __setitem__(self, key: Tensor, value: Any) -> None:
        self._home(key)[key] = value

    def __delitem__(self, key: Tensor) -> None:
        del self._home(key)[key]

    def __iter__(self) -> Iterator[Tensor]:
        return (key for optimizer in self._optimizers for key in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class CombinedOptimizer(_View):
    """Several optimizers over disjoint parameters, as one: Muon on matrices and AdamW on the rest, say.

    The closure is called once; then each makes its update. Optimizers that evaluate again belong in a class of
    their own, since each of them would move only its share of the point.

    Args:
        optimizers: Those that are combined, each with its own groups.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._state = _JoinedState(self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        return self._state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizers[0].defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizers[0].add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each, on one gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    @property
    def has_evaluation_point(self) -> bool:
        """Whether one of them trains and evaluates at different points."""
        return any(map(has_evaluation_point, self.optimizers))

    def train(self) -> None:
        """Goes to the point where gradients are taken, for those that have two."""
        for optimizer in filter(has_evaluation_point, self.optimizers):
            optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Goes to the point that is to be evaluated, for those that have two."""
        for optimizer in filter(has_evaluation_point, self.optimizers):
            optimizer.eval()  # type: ignore[attr-defined]
