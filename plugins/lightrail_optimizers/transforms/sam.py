"""SAM: the gradient at the worst point nearby."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.options import at_least, non_negative
from lightrail.step import Closure, Transform
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import answers_for, gradients, points_of, wide
from lightrail_optimizers.learning_rate_share import LearningRateShare
from lightrail_optimizers.nearby_gradients import dot, put_gradients, scaled, with_gradient
from lightrail_optimizers.tensor_lists import global_norm

__all__ = ["SAM", "ascent", "climb", "moved"]


def ascent(x: Sequence[Tensor], g: Sequence[Tensor], rho: float, adaptive: bool = False) -> tuple[list[Tensor], Tensor]:
    """The step to the worst point nearby, to first order: ``e = rho T² g / ||T g||``; T is 1, or ``|x|`` if adaptive.

    Args:
        x: Parameters.
        g: Their gradients.
        rho: Radius, >= 0.
        adaptive: Whether a coordinate's reach grows with its magnitude.

    Returns:
        e, new tensors in single precision at least, zeros where the whole gradient is zero; and ``||T g||``, a 0-d
        tensor.

    Example:
        >>> e, norm = ascent([torch.zeros(2)], [torch.tensor([3.0, 4.0])], 0.5)
        >>> [round(value, 6) for value in e[0].tolist()], norm.item()
        ([0.3, 0.4], 5.0)
    """
    s = wide(g)
    t = list(torch._foreach_abs(wide(x))) if adaptive and s else []
    if t:
        s = list(torch._foreach_mul(t, s))
    norm = global_norm(s)
    if t:
        torch._foreach_mul_(s, t)
    return scaled(s, torch.where(norm > 0, rho / norm, 0.0)), norm


def moved(x: Sequence[Tensor], e: Sequence[Tensor]) -> list[Tensor]:
    """``x + e``, as new tensors in the dtypes of x."""
    return [(x_i.detach() + e_i).to(x_i.dtype) for x_i, e_i in zip(x, e, strict=True)]


def climb(x: Sequence[Tensor], g: Sequence[Tensor | None], rho: float, adaptive: bool = False) -> list[Tensor]:
    """The worst point nearby, to first order: ``x + rho T² g / ||T g||``; T is 1, or ``|x|`` where adaptive.

    Args:
        x: Parameters.
        g: Gradients; a parameter without one stays where it is.
        rho: Radius, >= 0.
        adaptive: Whether a coordinate's reach grows with its magnitude.

    Returns:
        New tensors, one a parameter. Where the whole gradient is zero, copies of ``x``.

    Example:
        >>> point = climb([torch.tensor([1.0, 2.0]).double()], [torch.tensor([3.0, 4.0]).double()], 0.5)
        >>> [round(value, 6) for value in point[0].tolist()]
        [1.3, 2.4]
    """
    pairs = [(x_i, g_i) for x_i, g_i in zip(x, g, strict=True) if g_i is not None]
    moving = [x_i for x_i, _ in pairs]
    points = iter(moved(moving, ascent(moving, [g_i for _, g_i in pairs], rho, adaptive)[0]))
    return [x_i.detach().clone() if g_i is None else next(points) for x_i, g_i in zip(x, g, strict=True)]


class SAM(Transform):
    """Sharpness-aware minimization: climbs to the worst point within a radius and takes the gradient there.

    ``e = rho g / ||g||``, one norm over all parameters; the optimizer steps from x with the gradient at ``x + e``.

    Args:
        rho: Radius, >= 0; 0 is the optimizer without SAM, bit for bit, at the price of one evaluation.
        adaptive: ASAM: ``e = rho x² g / || |x| g ||``, unchanged when layers are rescaled; use a radius about ten
            times as large.
        parts: In how many disjoint parts of the batch each climbs by its own gradient (m-sharpness), >= 1. More of
            them regularize more, at the price of a third evaluation.
        radius_follows_lr: Whether the radius is ``rho lr / lr at the start``, so that it falls with the schedule.

    Raises:
        ConfigurationError: An option out of range, a sparse gradient or a complex parameter.
        ClosureError: The closure cannot evaluate elsewhere, or a batch has fewer samples than there are parts.

    Guarantees:
        All evaluations see the same micro-batches and the same dropout masks; BatchNorm statistics move once.
        Logged are the norm of the gradient (``|| |x| g ||`` if adaptive) and the sharpness ``L(x+e) - L(x)``; with
        one part it is integrated from the gradients at both ends, exact where the loss is quadratic.

    Deviations:
        In the paper each accelerator climbs by the gradient of its own share of the batch; here all of them climb
        together by the mean, unless there are ``parts``: slices of the batch, or runs of its micro-batches, of equal
        weight, whatever the number of accelerators. The published ASAM leaves biases unscaled and adds 0.01 to
        ``|x|``; here every parameter is treated alike and nothing is added.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [SAM(rho=0.5)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> [round(value, 4) for value in w.tolist()]
        [2.67, 3.56]

    Reference:
        Foret, Kleiner, Mobahi and Neyshabur, 2021, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", arXiv:2010.01412, Algorithm 1. Adaptive: Kwon, Kim, Park and Choi, 2021, "ASAM",
        arXiv:2102.11600, Algorithm 1.
    """

    traits = Traits(
        rule="g = gradient at x + rho g / ||g||",
        paper=(
            "Foret, Kleiner, Mobahi, Neyshabur, 2021, Sharpness-Aware Minimization for Efficiently Improving "
            "Generalization, arXiv:2010.01412"
        ),
        state=0,
        extra_evaluations=1,
        needs_closure=True,
        claim=Claim(
            sentence="a lower top Hessian eigenvalue than the optimizer alone, at the same learning rate",
            baseline_options={"lr": 0.01},
            problems=("sharpness",),
            options={"rho": 0.1},
            tuned=False,
        ),
        example={"rho": 0.05},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Several parts divide the batch, and each is evaluated where it stands and where it climbs."""
        if options.get("parts", 1) == 1:
            return SAM.traits
        return replace(SAM.traits, extra_evaluations=2, needs_groups=True)

    def __init__(
        self, rho: float = 0.05, adaptive: bool = False, parts: int = 1, radius_follows_lr: bool = False
    ) -> None:
        non_negative(rho=rho)
        at_least(1, parts=parts)
        self.rho = rho
        self.adaptive = adaptive
        self.parts = parts
        self.radius_follows_lr = radius_follows_lr
        self._share = LearningRateShare()
        self._figures: dict[str, Tensor] = {}

    def prepare(self, optimizer: Optimizer) -> None:
        if self.radius_follows_lr:
            self._share.watch(optimizer)

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        rho = self.rho * self._share.now()
        if rho == 0:
            return
        x = with_gradient("sam", closure)
        self._figures = self._climb(closure, x, rho) if self.parts == 1 else self._climb_in_parts(closure, x, rho)

    def _climb(self, closure: Closure, x: list[Tensor], rho: float) -> dict[str, Tensor]:
        e, norm = ascent(x, gradients(x), rho, self.adaptive)
        with closure.at(points_of(closure, x, moved(x, e))):
            closure()
        ends = [(e_i, p.grad) for e_i, p in zip(e, x, strict=True) if p.grad is not None]
        # The trapezoidal rule along e, where the slope at the start is rho ||T g||.
        risen = (rho * norm + dot([e_i for e_i, _ in ends], [above for _, above in ends])) / 2
        return {"gradient_norm": norm, "sharpness": risen}

    def _climb_in_parts(self, closure: Closure, x: list[Tensor], rho: float) -> dict[str, Tensor]:
        g = wide(gradients(x))
        total = [torch.zeros_like(g_i) for g_i in g]
        risen = torch.zeros(())
        for part in range(self.parts):
            with closure.part(part, self.parts):
                loss, own = closure.gradient()
                points = moved(x, ascent(x, answers_for(x, closure, own), rho, self.adaptive)[0])
                with closure.at(points_of(closure, x, points)):
                    above, found = closure.gradient()
            risen = (above - loss) / self.parts + risen.to(loss)
            if x:
                torch._foreach_add_(total, wide(answers_for(x, closure, found)), alpha=1 / self.parts)
        put_gradients(x, total)
        return {"gradient_norm": global_norm(g), "sharpness": risen}

    def logged(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._figures.items()}
