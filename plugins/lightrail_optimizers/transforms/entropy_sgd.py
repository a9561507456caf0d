"""Entropy-SGD: downhill in a loss that is smoothed by how wide its valleys are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ClosureError, ConfigurationError
from lightrail.options import at_least, between, non_negative, one_of, positive
from lightrail.step import Closure, Transform
from lightrail.step.sharded import copy_tensors
from lightrail.traits import Traits
from lightrail_optimizers.closure_answers import wide
from lightrail_optimizers.sophia_rule import draw_directions
from lightrail_optimizers.tensor_lists import global_norm, refuse_sparse

__all__ = ["EntropySGD", "langevin_displacement", "scope"]


def langevin_displacement(
    gradient: Callable[[int, list[Tensor]], Sequence[Tensor]],
    like: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
    gamma: float,
    alpha: float,
    noise: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """``x - mu`` after L Langevin steps from x, with mu the exponential average of where they went.

    ``d = g(x') + gamma (x' - x)``; ``x' -= lr d + noise sqrt(2 lr) xi``; ``mu = alpha mu + (1-alpha) x'``, in terms of
    ``u = x' - x`` and ``nu = mu - x``, which are small where x need not be. A momentum acts on g, before the pull.

    Args:
        gradient: ``gradient(l, u)``: g at x + u for the l-th step, from 0.
        like: x, for its shapes and devices.
        steps: L.
        lr: Of the inner steps, η'.

    Returns:
        New tensors in single precision at least.

    Example:
        >>> x = [torch.tensor([1.0])]
        >>> d = langevin_displacement(lambda l, u: [x[0] + u[0]], x, steps=2, lr=0.5, gamma=0.0, alpha=0.5)
        >>> d[0].item()  # x' = 0.5, 0.25; mu = 0.75, 0.5
        0.5
    """
    u = wide([torch.zeros_like(x) for x in like])
    nu = [torch.zeros_like(u_i) for u_i in u]
    buffer = [torch.zeros_like(u_i) for u_i in u] if momentum else []
    for step in range(steps):
        g = wide(gradient(step, u))
        if momentum:
            torch._foreach_mul_(buffer, momentum)
            torch._foreach_add_(buffer, g)
            g = list(torch._foreach_add(g, buffer, alpha=momentum)) if nesterov else buffer
        torch._foreach_mul_(u, 1 - lr * gamma)
        torch._foreach_add_(u, g, alpha=-lr)
        if noise:
            torch._foreach_add_(u, draw_directions(u, "gaussian"), alpha=-noise * math.sqrt(2 * lr))
        torch._foreach_lerp_(nu, u, 1 - alpha)
    torch._foreach_neg_(nu)
    return nu


def scope(t: int, gamma0: float, gamma1: float, highest: float) -> float:
    """``min(gamma0 (1 + gamma1)^t, highest)``.

    Example:
        >>> scope(0, 0.5, 1.0, 10.0), scope(3, 0.5, 1.0, 10.0), scope(10**6, 0.5, 1.0, 10.0)
        (0.5, 4.0, 10.0)
    """
    if gamma0 == 0:
        return 0.0
    # In logarithms, since the power overflows in a long run.
    if t * math.log1p(gamma1) >= math.log(highest) - math.log(gamma0):
        return highest
    return gamma0 * (1 + gamma1) ** t


class EntropySGD(Transform):
    """Replaces the gradient by that of the local entropy: towards where a short random walk downhill has its mean.

    From ``x' = mu = x``, L steps ``x' -= η' (g(x') + gamma_t (x' - x)) + noise sqrt(2 η') xi``;
    ``mu = alpha mu + (1-alpha) x'``, each on samples of its own; then the gradient is ``x - mu``, with which any
    optimizer makes the outer step. ``gamma_t = gamma0 (1 + gamma1)^t`` pulls the walk back, more and more.

    Args:
        steps: L, >= 0; 0 is the optimizer alone, bit for bit, at the price of one evaluation.
        inner_lr: η', > 0, a learning rate of SGD.
        gamma0: The pull at first, in [0, 1 / inner_lr]. The smaller, the wider the valleys that it looks for.
        gamma1: Growth of the pull a step (scoping), >= 0; it ends at ``1 / inner_lr``.
        alpha: Memory of mu, in [0, 1).
        noise: Strength of the random part of the walk, >= 0.
        momentum: Of the walk's gradients, in [0, 1), from zero at every step.
        nesterov: Whether that momentum looks ahead.
        multiply_by_gamma: ``gamma_t (x - mu)``, which is the local entropy's gradient as the paper derives it.
        batch: ``parts``: each inner step sees its own part of the accumulation window, so that all of them cost one
            evaluation; with ``trainer.accumulate`` at L it is a micro-batch. ``window``: each sees all of it, for L
            evaluations.

    Raises:
        ConfigurationError: An option out of range; a sparse gradient.
        ClosureError: The closure cannot evaluate elsewhere.

    Guarantees:
        Noise comes from torch's global generator, so an exact resume repeats it, and is the same on all ranks. The
        ordinary gradient is the one that is logged and moves BatchNorm statistics; no step is made of it. A part has
        at least two samples: where a micro-batch is too small for L such parts, there are as many as it allows and
        they take turns, which costs L evaluations over their number.

    Deviations:
        As in the published code, and unlike the paper, the gradient lacks the factor gamma. It is about
        ``η' (L - alpha / (1-alpha))`` gradients long whatever gamma is (0.5 by default, 1.7 with 20 steps), so that the
        learning rates of SGD serve; with the factor they would have to be larger by ``1 / gamma_t``, at every step by
        another. Also from the code is the noise, which the paper has smaller by sqrt(2). The pull stops growing where
        one inner step undoes all before it; beyond twice that the walk would diverge. Published runs take 20 steps,
        each on a whole mini-batch, and have weight decay and the outer momentum in the walk too.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> entropy = EntropySGD(steps=2, inner_lr=0.5, gamma0=0.0, alpha=0.5, noise=0.0)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [entropy])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> w.item()  # mu
        0.5

    Reference:
        Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun and Zecchina, 2017, "Entropy-SGD: Biasing
        Gradient Descent Into Wide Valleys", arXiv:1611.01838, Algorithm 1.
    """

    traits = Traits(
        rule="g = x - mu, mu an average of L steps x' -= h (gradient at x' + gamma (x' - x)) + noise, from x",
        paper=(
            "Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun, Zecchina, 2017, Entropy-SGD: "
            "Biasing Gradient Descent Into Wide Valleys, arXiv:1611.01838"
        ),
        state=0,
        extra_evaluations=1,
        needs_closure=True,
        needs_groups=True,
        is_stochastic=True,
        example={"steps": 3},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """What it costs depends on ``steps`` and ``batch``; without noise it draws nothing."""
        given = {"steps": 8, "batch": "parts", "noise": 1e-4, **options}
        traits = replace(EntropySGD.traits, is_stochastic=bool(given["noise"] and given["steps"]))
        if not given["steps"]:
            return replace(traits, extra_evaluations=0, needs_closure=False, needs_groups=False)
        if given["batch"] == "window":
            return replace(traits, extra_evaluations=given["steps"], needs_groups=False)
        return traits

    def __init__(
        self,
        steps: int = 8,
        inner_lr: float = 0.1,
        gamma0: float = 0.03,
        gamma1: float = 1e-3,
        alpha: float = 0.75,
        noise: float = 1e-4,
        momentum: float = 0.0,
        nesterov: bool = True,
        multiply_by_gamma: bool = False,
        batch: str = "parts",
    ) -> None:
        at_least(0, steps=steps)
        positive(inner_lr=inner_lr)
        between(0.0, 1 / inner_lr, closed="both", gamma0=gamma0)
        non_negative(gamma1=gamma1, noise=noise)
        between(0.0, 1.0, alpha=alpha, momentum=momentum)
        one_of(("parts", "window"), batch=batch)
        if multiply_by_gamma and gamma0 == 0:
            raise ConfigurationError(
                "multiply_by_gamma leaves no gradient where gamma is zero",
                found="multiply_by_gamma=true, gamma0=0",
                allowed="multiply_by_gamma with gamma0 greater than 0",
                remedy="Set gamma0, or leave out multiply_by_gamma.",
            )
        self.steps = steps
        self.inner_lr = inner_lr
        self.gamma0 = gamma0
        self.gamma1 = gamma1
        self.alpha = alpha
        self.noise = noise
        self.momentum = momentum
        self.nesterov = nesterov
        self.multiply_by_gamma = multiply_by_gamma
        self.batch = batch
        self._t = 0
        self._logged: tuple[float, Tensor] | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.steps == 0:
            return
        moving = [i for i, p in enumerate(closure.params) if p.grad is not None]
        x = [closure.params[i] for i in moving]
        for p in x:
            if p.grad is not None and p.grad.is_sparse:
                refuse_sparse("entropy_sgd", p.grad)
        gamma = scope(self._t, self.gamma0, self.gamma1, 1 / self.inner_lr)
        self._t += not self.is_repeated
        if not x:
            return
        found = self._displacement(closure, moving, x, gamma)
        self._logged = gamma, global_norm(found)
        if self.multiply_by_gamma:
            torch._foreach_mul_(found, gamma)
        for p, g in zip(x, found, strict=True):
            p.grad = g.to(p.dtype)

    def _displacement(self, closure: Closure, moving: list[int], x: list[Tensor], gamma: float) -> list[Tensor]:
        count = self._parts(closure) if self.batch == "parts" else 1
        origin = [p.detach().clone() for p in x]

        def gradient(step: int, u: list[Tensor]) -> list[Tensor]:
            if step:
                copy_tensors(x, torch._foreach_add(origin, u))
            with closure.part(step % count, count):
                _, g = closure.gradient()
            return [g[i] for i in moving]

        # Entered once, for the way back; within, the walk goes on from where it is.
        with closure.at([p.detach() for p in closure.params]):
            return langevin_displacement(
                gradient,
                origin,
                steps=self.steps,
                lr=self.inner_lr,
                gamma=gamma,
                alpha=self.alpha,
                noise=self.noise,
                momentum=self.momentum,
                nesterov=self.nesterov,
            )

    def _parts(self, closure: Closure) -> int:
        """The most parts, at most L, that each can be divided again: two samples are the least for a BatchNorm."""
        for count in range(self.steps, 1, -1):
            try:
                with closure.part(count - 1, count), closure.part(0, 2):
                    return count
            except ClosureError:
                continue
        return 1

    def state_dict(self) -> dict[str, Any]:
        return {"t": self._t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._t = state["t"]

    def logged(self) -> dict[str, float]:
        """The pull, and how far from x the average of the walk is."""
        return {} if self._logged is None else {"gamma": self._logged[0], "distance": float(self._logged[1])}
