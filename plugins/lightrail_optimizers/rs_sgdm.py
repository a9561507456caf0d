"""SGD with momentum whose every step is scaled by one random number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative
from lightrail.traits import Claim, Traits
from lightrail_optimizers.iterate_average import IterateAverage, average_, exponential_weight
from lightrail_optimizers.momentum_rule import momentum_step_
from lightrail_optimizers.sophia_rule import draw_directions

__all__ = ["RandomlyScaledSGDM", "draw_exponential", "rs_sgdm"]


def rs_sgdm(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    average: list[Tensor],
    *,
    lr: float | Tensor,
    t: int | Tensor,
    b: float,
    wd: float,
) -> None:
    """One update, in place: ``m = b m + g + wd x``; ``x -= lr m``; ``x̄ = (1-c) x̄ + c x``, ``c = (1-b) / (1-b^t)``.

    Args:
        x: Parameters.
        g: Gradients; they stay as they are.
        m: Momenta.
        average: x̄.
        lr: The learning rate times the random scalar of this step.
        t: The step, from 1.
    """
    momentum_step_(x, g, m, lr=lr, b=b, wd=wd)
    average_(average, x, exponential_weight(t, b))


def draw_exponential(like: Tensor) -> float:
    """One number from the exponential distribution of mean 1, the same on every rank.

    Args:
        like: A tensor on the device that the ranks talk through.
    """
    # Half the sum of the squares of two standard normal numbers is exponential.
    (u,) = draw_directions([torch.empty(2, device=like.device)], "gaussian")
    return float(u.double().square().sum() / 2)


class RandomlyScaledSGDM(IterateAverage):
    """SGD with momentum, every step of which is as long as an exponential random number says.

    ``s ~ Exp(1)``, one number a step for all parameters; ``m = momentum m + g``; ``x -= s lr m``. What is evaluated is
    the exponential average of x with the momentum's own memory: ``eval()`` goes there and ``train()`` back.

    With s = 1 it is torch's SGD with momentum bit for bit, and it takes the same learning rates. The random scale makes
    the loss's change over a step equal, in expectation, its gradient at the new point times the step, which is what the
    guarantee for losses that are neither smooth nor convex rests on. The paper finds accuracy as good as SGD's, not
    better.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        momentum: In [0, 1).
        weight_decay: Added to the gradient as ``weight_decay x``, >= 0, as SGD does.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same bit for bit, tensor by tensor, with less memory.
        compile: Compile the update; neither the random scale nor a schedule compiles it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        UserError: A step at the evaluation point.

    Guarantees:
        s comes from torch's global generator, so an exact resume repeats it, and is the same on all ranks.

    Deviations:
        The analysis shrinks the momentum by ``1 / (1 + lr mu)`` a step, with a mu that vanishes as training goes on;
        here it is 0. BatchNorm statistics are those of x, not of the average.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> w.grad = torch.tensor([1.0, 2.0])
        >>> _ = torch.manual_seed(0)
        >>> RandomlyScaledSGDM([w], lr=0.1).step()
        >>> bool(torch.isclose(w[1], 2 * w[0])), bool(w[0] < 1)  # one scale for all
        (True, True)

    Reference:
        Zhang and Cutkosky, 2024, "Random Scaling and Momentum for Non-smooth Non-convex Optimization",
        arXiv:2405.09742: the instance of Exponentiated O2NC with online mirror descent.
    """

    traits = Traits(
        rule="m = b m + g; x -= s lr m, s ~ Exp(1); evaluated at the average of x with weights b^(t-i)",
        paper=(
            "Zhang, Cutkosky, 2024, Random Scaling and Momentum for Non-smooth Non-convex Optimization, "
            "arXiv:2405.09742"
        ),
        state=2,
        has_evaluation_point=True,
        is_stochastic=True,
        example={"lr": 0.01},
        claim=Claim(
            sentence="no worse than SGD with momentum",
            baseline="sgd",
            baseline_options={"momentum": 0.9},
            margin=0.02,
        ),
    )
    state_names = ("momentum", "average")
    rule = staticmethod(rs_sgdm)

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay)
        between(0.0, 1.0, momentum=momentum)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )
        self._scale = 1.0

    def update(self) -> None:
        """Draws the scale of this step, and takes it."""
        some = next((p for group in self.param_groups for p in group["params"]), None)
        if some is not None:
            self._scale = draw_exponential(some)
            super().update()

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        return {
            "lr": self._scale * float(group["lr"]),
            "t": t,
            "b": group["momentum"],
            "wd": group["weight_decay"],
        }
