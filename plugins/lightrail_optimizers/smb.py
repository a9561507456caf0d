"""SMB: a gradient step that is tested, and bent by a quadratic model of each tensor where the test fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, between, non_negative, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.closure_answers import Moving, answers_for, gradients, inner, moving, points_of, wide
from lightrail_optimizers.flat_vector import working_dtype
from lightrail_optimizers.own_step_size import refuse_schedule
from lightrail_optimizers.tensorwise import MethodOptimizer, require_closure

__all__ = ["SMB", "model_coefficients", "model_steps"]


def model_coefficients(
    ss: float, yy: float, gg: float, ys: float, yg: float, sg: float, *, omega: float
) -> tuple[float, float, float]:
    """``(c_s, c_g, c_y)`` of the step ``c_s s + c_g g + c_y y`` to where the model of one tensor is least.

    ``sigma = ½(||s|| (||y|| + ||g||/omega) - yᵀs)``, ``theta = (yᵀs + 2 sigma)² - ||s||² ||y||²``;
    ``c_g = -||s||² / (2 sigma)``, ``c_s = c_g/theta (-(yᵀs + 2 sigma) yᵀg + ||y||² sᵀg)``,
    ``c_y = c_g/theta (-(yᵀs + 2 sigma) sᵀg + ||s||² yᵀg)``.

    Args:
        ss: ``||s||²``, s the trial step.
        yy: ``||y||²``, y the change of the gradient along it.
        gg: ``||g||²``, of the gradient that made the trial.
        ys: ``yᵀs``.
        yg: ``yᵀg``.
        sg: ``sᵀg``.
        omega: Below 1; the smaller, the shorter the step.

    Returns:
        Zeros where there is no model: no trial step, or one that leads to no finite gradient.
    """
    s, y, g = math.sqrt(ss), math.sqrt(yy), math.sqrt(gg)
    q = s * (y + g / omega)  # yᵀs + 2 sigma
    sigma, theta = (q - ys) / 2, ss * (g / omega) * (2 * y + g / omega)  # theta without the cancellation
    if not (0 < sigma < math.inf and 0 < theta < math.inf):
        return 0.0, 0.0, 0.0
    c_g = -ss / (2 * sigma)
    return c_g / theta * (yy * sg - q * yg), c_g, c_g / theta * (ss * yg - q * sg)


def model_steps(
    s: Sequence[Tensor], y: Sequence[Tensor], g: Sequence[Tensor], trial_g: Sequence[Tensor], *, omega: float
) -> list[Tensor]:
    """The step of each tensor by :func:`model_coefficients`, in single precision at least.

    Args:
        s: Trial steps; at least one.
        y: Changes of the gradient along them.
        g: Gradients whose descent is wanted.
        trial_g: Gradients that made the trial: ``g``, or those of another batch.
        omega: Below 1.
    """
    s, y, g, trial_g = wide(s), wide(y), wide(g), wide(trial_g)
    pairs = ((s, s), (y, y), (trial_g, trial_g), (y, s), (y, g), (s, g))
    device, dtype = s[0].device, working_dtype(s)
    products = [p.sum().to(device, dtype) for a, b in pairs for p in torch._foreach_mul(a, b)]
    by_tensor = torch.stack(products).view(len(pairs), len(s)).t().tolist()
    steps = []
    for s_i, y_i, g_i, dots in zip(s, y, g, by_tensor, strict=True):
        c_s, c_g, c_y = model_coefficients(*dots, omega=omega)
        steps.append(s_i * c_s + g_i * c_g + y_i * c_y if c_g else torch.zeros_like(g_i))
    return steps


class SMB(MethodOptimizer):
    """SMB: tries the gradient step, and where it lowers the loss too little, bends it by a model of each tensor.

    Trial ``s = -lr g``; taken if ``f(x + s) <= f(x) - c Σ lr ||g||²``. If not, each tensor takes
    ``x += c_s s + c_g g + c_y y`` with ``y = ∇f(x + s) - g``, where a quadratic model through both gradients is least.

    Args:
        params: Parameters or parameter groups.
        lr: Of the trial, >= 0; it follows a schedule. It may be several times what gradient descent bears: the model
            mends the direction in which the gradient of a tensor turns most, though no more than that one.
        c: How much of the decrease that the gradient promises must come true, in [0, 1); the first group's counts.
        omega: In (0, 1); the smaller, the shorter the model's steps.
        independent: SMBi: a trial that fails moves nothing, and the next step makes the model from its own batch, for
            the gradient of the batch that failed. The step is then unbiased, and costs a batch.
        adapt_every: After so many steps the trial's length is shrunk if too many trials failed, and else stretched;
            ``None`` leaves it. The first group's options of this kind count.
        adapt_by: The factor, in (0, 1).
        tolerated: The share of failures above which it shrinks, in [0, 1]; half of it under ``independent``, where a
            failure takes two steps.
        lr_max: No stretching takes a group's trial beyond this, > 0.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: The closure is not a :class:`lightrail.Closure`.

    Deviations:
        All groups are tried at once, and one test decides for all. The authors' code tries them one after another
        against a loss that has the moves of the groups before in it, so that a group may pass on another's merit. A
        tensor whose gradient is zero stays, where theirs becomes NaN, and so does one whose trial gradient is not
        finite. The length of the trial is kept beside ``lr`` rather than in it.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SMB([x], lr=1.0)
        >>> loss = optimizer.step(Closure(lambda: (1.5 * x**2).sum(), [x]))
        >>> round(x.item(), 6), optimizer.logged()
        (0.572046, {'model_step': 1.0})

    Reference:
        Birbil, Martin, Onay and Öztoprak, 2021, "Bolstering Stochastic Gradient Descent with Model Building",
        arXiv:2111.07058, Algorithm 1.
    """

    traits = Traits(
        rule="x += s = -lr g if that lowers the loss enough, else x += c_s s + c_g g + c_y y, tensor by tensor",
        paper=(
            "Birbil, Martin, Onay, Öztoprak, 2021, Bolstering Stochastic Gradient Descent with Model Building, "
            "arXiv:2111.07058"
        ),
        state=0,
        extra_evaluations=1,
        needs_closure=True,
        needs_whole_tensors=True,
        sets_step_size=True,
        example={"lr": 1.0},
        claim=Claim(sentence="as good as Adam, with little tuning", baseline="adam", margin=0.02, tuned=True),
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """As ``traits``; the independent kind keeps the gradient of a trial that failed."""
        return dataclasses.replace(SMB.traits, state=1 if options.get("independent") else 0)

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        c: float = 0.1,
        omega: float = 0.99,
        independent: bool = False,
        adapt_every: int | None = None,
        adapt_by: float = 0.9,
        tolerated: float = 0.05,
        lr_max: float = 20.0,
    ) -> None:
        non_negative(lr=lr)
        positive(lr_max=lr_max)
        between(0.0, 1.0, c=c)
        between(0.0, 1.0, closed="neither", omega=omega, adapt_by=adapt_by)
        between(0.0, 1.0, closed="both", tolerated=tolerated)
        if adapt_every is not None:
            at_least(1, adapt_every=adapt_every)
        super().__init__(
            params,
            {
                "lr": lr,
                "c": c,
                "omega": omega,
                "independent": independent,
                "adapt_every": adapt_every,
                "adapt_by": adapt_by,
                "tolerated": tolerated,
                "lr_max": lr_max,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: A :class:`lightrail.Closure`.

        Returns:
            The loss at the point where the step began.
        """
        oracle = require_closure(self, closure, "tries a step before it takes one")
        for group in self.param_groups:
            refuse_schedule(self, group)
        loss = oracle()
        groups = moving(self, oracle)
        if not groups:
            return loss
        x = [p for _, each in groups for p in each]
        s = [u for group, each in groups for u in torch._foreach_mul(gradients(each), -self._length(group))]
        points = list(torch._foreach_add(x, s))
        kept = self.param_groups[0]
        owed = bool(kept.get("owed", False))
        with oracle.at(points_of(oracle, x, points)):
            passed = not owed and float(oracle.loss()) <= float(loss) - self._promised(groups)
            models = not passed and (owed or not kept["independent"])
            trial_g = answers_for(x, oracle, oracle.gradient()[1]) if models else []
        if passed:
            torch._foreach_copy_(x, points)
        elif models:
            self._take_model_step(x, s, trial_g)
        else:
            self._keep_gradient(x)
        kept["owed"] = not passed and not models
        self._count(models)
        return loss

    def _length(self, group: dict[str, Any]) -> float:
        """Of the group's trial, in gradients."""
        return float(group["lr"]) * self.param_groups[0].get("stretch", 1.0)

    def _promised(self, groups: Moving) -> float:
        """The decrease that the trial must bring."""
        c = self.param_groups[0]["c"]
        return sum(c * self._length(group) * inner(gradients(x), gradients(x)) for group, x in groups)

    def _take_model_step(self, x: list[Tensor], s: list[Tensor], trial_g: list[Tensor]) -> None:
        g = gradients(x)
        y = list(torch._foreach_sub(wide(trial_g), wide(g)))
        wanted = g
        if self.param_groups[0]["independent"]:
            # A tensor that had no gradient when the trial failed goes by this batch's.
            wanted = [self.state.get(p, {}).get("gradient", each) for p, each in zip(x, g, strict=True)]
        steps = model_steps(s, y, wanted, g, omega=self.param_groups[0]["omega"])
        torch._foreach_add_(x, [step.to(p.dtype) for step, p in zip(steps, x, strict=True)])

    def _keep_gradient(self, x: list[Tensor]) -> None:
        for p in self.state:
            self.state[p].pop("gradient", None)
        for p, g in zip(x, gradients(x), strict=True):
            self.state[p]["gradient"] = g.clone(memory_format=torch.preserve_format)

    def _count(self, models: bool) -> None:
        """Stretches or shrinks the trials to come, by the share of model steps among the last."""
        kept = self.param_groups[0]
        kept["model_step"] = float(models)
        if kept["adapt_every"] is None:
            return
        kept["counted"] = kept.get("counted", 0) + 1
        kept["failed"] = kept.get("failed", 0) + int(models)
        if kept["counted"] < kept["adapt_every"]:
            return
        tolerated = kept["tolerated"] / 2 if kept["independent"] else kept["tolerated"]
        if kept["failed"] / kept["counted"] > tolerated:
            kept["stretch"] = kept.get("stretch", 1.0) * kept["adapt_by"]
        elif all(self._length(group) / kept["adapt_by"] <= group["lr_max"] for group in self.param_groups):
            kept["stretch"] = kept.get("stretch", 1.0) / kept["adapt_by"]
        kept["counted"] = kept["failed"] = 0

    def logged(self) -> dict[str, float]:
        """Figures of the last step that are worth a curve."""
        kept = self.param_groups[0]
        found = {"model_step": kept["model_step"]} if "model_step" in kept else {}
        return found | ({"trial_stretch": kept["stretch"]} if "stretch" in kept else {})
