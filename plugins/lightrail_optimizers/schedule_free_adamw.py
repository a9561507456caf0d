"""Schedule-Free AdamW, from the authors' library."""

from __future__ import annotations

from typing import Any

import torch

from lightrail.options import at_least, between, non_negative, positive
from lightrail.traits import Claim, Traits
from lightrail_optimizers.iterate_average import require_training_point
from lightrail_optimizers.library_optimizer import LibraryOptimizer, missing_library
from lightrail_optimizers.own_step_size import refuse_schedule

try:
    import schedulefree
except ModuleNotFoundError as error:
    raise missing_library("optimizer 'schedule_free_adamw'", error) from error

__all__ = ["ScheduleFreeAdamW"]


class ScheduleFreeAdamW(LibraryOptimizer, schedulefree.AdamWScheduleFree):
    """AdamW whose average of iterates takes the place of a learning rate schedule.

    ``y = b1 x + (1-b1) z``, where gradients are taken; ``v = b2 v + (1-b2) g²``;
    ``z -= lr (g / (sqrt(v / (1-b2^t)) + eps) + weight_decay y)``; ``x = (1-c) x + c z``, with ``c = lr² / sum of lr²``.
    The parameters stand at y; ``eval()`` goes to x, which is what is evaluated and saved, and ``train()`` back. Needs
    the extra ``optimizers``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0; one to ten times AdamW's. No schedule may change it.
        betas: ``(b1, b2)``, in (0, 1) and [0, 1); b1 as large as 0.98 for long runs.
        eps: Added to the root of the second moment, > 0.
        weight_decay: >= 0, at y.
        warmup_steps: Steps of linear warm-up, >= 0.
        r: Iterate t counts in x as t to this power, >= 0.
        weight_lr_power: It also counts as ``lr`` to this power, >= 0.
        foreach: One call for many tensors.

    Raises:
        ConfigurationError: An option out of range, a schedule, a complex parameter or a sparse gradient.
        UserError: A step at the evaluation point.
        PluginError: The extra ``optimizers`` is not installed.

    Deviations:
        It starts in training mode, ``train()`` after ``eval()`` comes back bit for bit, and ``.grad`` is not edited, at
        the price of a copy of the gradients while a step lasts. BatchNorm statistics are those of y, not of x.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = ScheduleFreeAdamW([w], lr=0.1)
        >>> w.grad = torch.tensor([0.5, -1.0])
        >>> optimizer.step()
        >>> optimizer.eval()
        >>> [round(value, 4) for value in w.tolist()]
        [0.9, 2.1]

    Reference:
        Defazio, Yang, Mehta, Mishchenko, Khaled and Cutkosky, 2024, "The Road Less Scheduled", arXiv:2405.15682,
        Algorithm 1. The update is that of the library schedulefree.
    """

    traits = Traits(
        rule="z -= lr Adam(g at y), x averages z, y = b1 x + (1-b1) z; evaluated at x",
        paper="Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, 2024, The Road Less Scheduled, arXiv:2405.15682",
        state=2,
        sets_step_size=True,
        has_evaluation_point=True,
        example={"lr": 0.01},
        claim=Claim(sentence="as good as AdamW under a schedule", margin=0.02, tuned=True),
    )
    _edits_gradients = True

    def __init__(
        self,
        params: Any,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool = True,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power)
        b1, b2 = betas
        between(0.0, 1.0, closed="neither", beta1=b1)
        between(0.0, 1.0, beta2=b2)
        positive(eps=eps)
        at_least(0, warmup_steps=warmup_steps)
        schedulefree.AdamWScheduleFree.__init__(
            self,
            params,
            lr=lr,
            betas=(b1, b2),
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            foreach=foreach,
        )
        self.defaults["train_mode"] = True
        for group in self.param_groups:
            group["train_mode"] = True

    def step(self, closure: Any = None) -> Any:
        """One step.

        Args:
            closure: Evaluates the loss and its gradient; ``None`` with gradients in ``.grad``.

        Returns:
            The loss that the closure gave.

        Raises:
            UserError: :meth:`eval` was called, and :meth:`train` was not.
        """
        require_training_point(self, not all(group["train_mode"] for group in self.param_groups))
        for group in self.param_groups:
            refuse_schedule(self, group, "Leave the schedule out; for a warm-up, set warmup_steps.")
        return super().step(closure)

    @torch.no_grad()
    def eval(self) -> None:
        """Goes to x, where the model is to be evaluated; nothing where it is there already."""
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if p in self.state:
                        # The library computes y from x and z again, which does not come back to the last bit.
                        self.state[p]["y"] = p.detach().clone()
        schedulefree.AdamWScheduleFree.eval(self)

    @torch.no_grad()
    def train(self) -> None:
        """Goes back to y, where gradients are taken, bit for bit."""
        schedulefree.AdamWScheduleFree.train(self)
        for group in self.param_groups:
            for p in group["params"]:
                if "y" in self.state.get(p, {}):
                    p.copy_(self.state[p].pop("y"))
