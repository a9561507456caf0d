"""SSO: several steps on a surrogate in the space of the model's outputs, for one gradient of the loss there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.closure_answers import answers_for, gradients, inner, points_of, wide
from lightrail_optimizers.tensor_lists import refuse_sparse

__all__ = ["SSO", "descend", "descend_by_search", "surrogate"]

# Armijo's rule: the share of the predicted decrease that is asked for, and how often a step is halved at most.
_ARMIJO = 0.1
_HALVINGS = 20

# The value and the gradient of q at given points.
Evaluate = Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]


def surrogate(z: Tensor, z_t: Tensor, d: Tensor, eta: float) -> Tensor:
    """``q = <d, z - z_t> + ||z - z_t||² / (2 eta n)`` for n samples: an upper bound on the loss where eta is small.

    Args:
        z: The outputs that change; the last of several axes is that of one sample's output.
        z_t: The outputs around which the loss is linearised.
        d: The gradient of the mean loss in the outputs, at ``z_t``.
        eta: Step size in the space of outputs, > 0: where z is free, q is least at ``z_t - eta n d``, one gradient step
            on every sample's own loss.

    Returns:
        A 0-d tensor, in single precision at least; zero at ``z_t``.

    Example:
        >>> surrogate(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[-2.0, 0.0]]), eta=0.5).item()
        -1.0
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    move = z.to(dtype) - z_t.to(dtype)
    n = z.shape[:-1].numel() if z.dim() > 1 else z.numel()
    return (d.to(dtype) * move).sum() + move.square().sum() / (2 * eta * n)


def descend(x: Sequence[Tensor], g: Sequence[Tensor], evaluate: Evaluate, m: int, lr: float) -> list[Tensor]:
    """Gradient descent on q: ``theta_{k+1} = theta_k - lr g_k``, m steps.

    Args:
        x: theta_0.
        g: g_0, the gradient of q there.
        evaluate: Asked m-1 times.
        m: >= 1.
        lr: > 0.

    Returns:
        ``(theta_0 - theta_m) / lr``, one new tensor a parameter.

    Example:
        >>> bowl = lambda x: (2 * (x[0] - 1).square().sum(), [4 * (x[0] - 1)])
        >>> u = descend([torch.zeros(1)], [torch.tensor([-4.0])], bowl, m=2, lr=0.125)
        >>> u[0].tolist()  # from 0 to 0.5 to 0.75
        [-6.0]
    """
    u = [each.clone() for each in g]
    for _ in range(m - 1):
        torch._foreach_add_(u, evaluate(_moved(x, u, lr))[1])
    return u


def descend_by_search(
    x: Sequence[Tensor], g: Sequence[Tensor], evaluate: Evaluate, m: int, lr: float
) -> tuple[list[Tensor], float]:
    """As :func:`descend` from a point where q is 0, with steps that are long enough and not too long (Armijo).

    A step s, ``lr`` at first, is halved until ``q(theta - s g) <= q(theta) - 0.1 s ||g||²``, and stays halved for the
    steps after it. Where twenty halvings do not help, or q changes by less than its rounding, the descent ends.

    Returns:
        ``(theta_0 - theta_m) / lr``, and the last step that was tried.
    """
    u = [torch.zeros_like(each) for each in g]
    value, rounding, s, halvings = 0.0, 0.0, lr, 0
    for _ in range(m):
        slope = inner(g, g)
        if s * slope <= rounding:  # from here on the values of q tell nothing
            break
        while halvings <= _HALVINGS:
            ahead = list(torch._foreach_add(u, list(g), alpha=s / lr))
            found, new = evaluate(_moved(x, ahead, lr))
            if float(found) <= value - _ARMIJO * s * slope:
                u, g, value = ahead, new, float(found)
                rounding = 8 * torch.finfo(found.dtype).eps * abs(value)
                break
            s, halvings = s / 2, halvings + 1
    return u, s


def _moved(x: Sequence[Tensor], u: Sequence[Tensor], lr: float) -> list[Tensor]:
    """``x - lr u``, in the arithmetic of torch's SGD."""
    return list(torch._foreach_add(wide(x), list(u), alpha=-lr))


class SSO(Transform):
    """Target-based surrogates: m steps on an upper bound on the loss, for one gradient in the space of outputs.

    With outputs ``z = f(theta)``, ``z_t = f(theta_t)`` and ``d`` the gradient of the mean loss in ``z_t``, taken once,

    ``q(theta) = <d, z - z_t> + ||z - z_t||² / (2 eta n)``,  ``theta_{k+1} = theta_k - lr grad q(theta_k)``

    and the optimizer receives ``(theta_0 - theta_m) / lr`` for its gradient, so that SGD at that rate arrives at
    ``theta_m``. It pays where the loss of given outputs is expensive (a simulation, a ranking, a solver) and the model
    is cheap: an inner step evaluates the model, but not the loss.

    Args:
        steps: m, >= 1; 1 is the optimizer without SSO, bit for bit.
        target_lr: eta, > 0: the gradient step that each sample's output would make, were it free. Up to 1 over the
            curvature of the loss in the outputs, q bounds the loss: 1 for half the squared error, 2 for cross entropy.
        inner_lr: lr, > 0; the first to be tried in a line search. Give SGD the same.
        line_search: Whether each inner step is halved until q decreases by a tenth of what its slope promises.

    Raises:
        ConfigurationError: An option out of range, or a sparse gradient.
        ClosureError: The task offers no ``outputs`` and ``output_loss``.

    Guarantees:
        All evaluations see the same micro-batches and dropout masks. Where the model is linear and q is minimized
        exactly, the outputs make a gradient step of length ``target_lr``, projected onto what the model can reach.

    Deviations:
        The first inner step takes the gradient that is there, so that transforms before this one, and terms of the
        loss beside ``output_loss``, act on that step. The published code weighs the quadratic term by 1 rather than 1/2
        and averages it over the entries of z rather than over samples. Its schedules of eta are left out: a schedule of
        the learning rate scales the whole move.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> outputs, loss = (lambda x: x * w), (lambda z, x: ((z - 2 * x) ** 2).mean() / 2)
        >>> whole = lambda x: loss(outputs(x), x)
        >>> closure = Closure(whole, [w], torch.ones(4), outputs_fn=outputs, output_loss_fn=loss)
        >>> sso = SSO(steps=3, target_lr=1.0, inner_lr=0.5)
        >>> value = TransformedOptimizer(torch.optim.SGD([w], lr=0.5), [sso]).step(closure)
        >>> w.tolist()  # towards the least q, at 2: by 1, by 0.5, by 0.25
        [1.75]

    Reference:
        Lavington, Vaswani, Babanezhad, Schmidt and Le Roux, 2023, "Target-based Surrogates for Stochastic
        Optimization", arXiv:2302.02607, Algorithm 1.
    """

    traits = Traits(
        rule="g = (theta - theta_m) / lr, theta_m from m steps on <d, z - z_t> + ||z - z_t||² / (2 eta n)",
        paper=(
            "Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, 2023, Target-based Surrogates for Stochastic "
            "Optimization, arXiv:2302.02607"
        ),
        state=0,
        extra_evaluations=5,
        needs_closure=True,
        needs_outputs=True,
        example={"steps": 3, "inner_lr": 0.05},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As ``traits``; the outputs are evaluated once, and the model once an inner step after the first."""
        steps = options.get("steps", 5)
        spent = None if options.get("line_search") else steps if steps > 1 else 0
        return dataclasses.replace(SSO.traits, extra_evaluations=spent)

    def __init__(
        self, steps: int = 5, target_lr: float = 1.0, inner_lr: float = 0.1, line_search: bool = False
    ) -> None:
        at_least(1, steps=steps)
        positive(target_lr=target_lr, inner_lr=inner_lr)
        self.steps = steps
        self.target_lr = target_lr
        self.inner_lr = inner_lr
        self.line_search = line_search
        self._logged: dict[str, Tensor | float] = {}

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        moving = [p for p in closure.params if p.grad is not None]
        if not moving or (self.steps == 1 and not self.line_search):
            return
        for p in moving:
            if p.grad is not None and p.grad.is_sparse:
                refuse_sparse("SSO", p.grad)
        evaluate, g = self._surrogate_around(moving, closure), wide(gradients(moving))
        if self.line_search:
            u, self._logged["inner_lr"] = descend_by_search(moving, g, evaluate, self.steps, self.inner_lr)
        else:
            u = descend(moving, g, evaluate, self.steps, self.inner_lr)
        for p, each in zip(moving, u, strict=True):
            p.grad = each.to(p.dtype)

    def _surrogate_around(self, moving: list[Tensor], closure: Closure) -> Evaluate:
        """q and its gradient in the parameters that move, around the point where they are now."""
        kept: list[tuple[Tensor, Tensor]] = []

        def linearise(batch: Any) -> Tensor:
            z_t = closure.outputs(batch).detach().requires_grad_()
            with torch.enable_grad():
                loss = closure.output_loss(z_t, batch)
                (d,) = torch.autograd.grad(loss, z_t)
            kept.append((z_t.detach(), d))
            return loss.detach()

        closure.value_of(linearise)

        def evaluate(points: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            window: Iterator[tuple[Tensor, Tensor]] = iter(kept)
            with closure.at(points_of(closure, moving, points)):
                value, found = closure.gradient_of(
                    lambda batch: surrogate(closure.outputs(batch), *next(window), self.target_lr)
                )
            self._logged["surrogate"] = value
            return value, wide(answers_for(moving, closure, found))

        return evaluate

    def logged(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._logged.items()}
