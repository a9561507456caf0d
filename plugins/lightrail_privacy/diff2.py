"""DIFF2: the gradient of all records, private by way of how it changes."""

from __future__ import annotations

from typing import Any, ClassVar

from lightrail.options import at_least, between, positive
from lightrail.privacy import PrivateHorizon
from lightrail.traits import Claim, Traits
from lightrail_privacy.gradient_differences import GradientDifferences

__all__ = ["DIFF2"]


class DIFF2(GradientDifferences):
    r"""Releases the gradient of all records once, and from then on how the gradient changed, which takes less noise.

    .. math::
        v_r = \tfrac{1}{n} \left(\sum_i \mathrm{clip}(g_i(x_{r-1}), C_1) + z_1 C_1 \xi\right)
        \text{ if } (r - 1) \bmod T_r = 0, \qquad
        v_r = v_{r-1} + \tfrac{1}{n} \left(\sum_i \mathrm{clip}(g_i(x_{r-1}) - g_i(x_{r-2}), C_{2,r})
        + z_2 C_{2,r} \xi\right) \text{ otherwise}, \qquad C_{2,r} = C_2 \|x_{r-1} - x_{r-2}\|

    At one learning rate, many steps of it are less noisy than those of DP-SGD with ``sampling=full``; where each had a
    learning rate of its own, DP-SGD was as good or better in all that was measured. The noise feeds on itself: with
    SGD at a rate of η, d parameters and gradients that stay as they are, :math:`\|v\|^2` grows on average by
    :math:`1 + (\eta C_2 z_2)^2 d / n^2` a step, which a restart ends.

    Args:
        clip_norm: C_1, the largest norm of a sample's gradient, greater than 0.
        smoothness: C_2, the largest change of a sample's gradient for a step of length 1, greater than 0. Too small a
            number loses part of the change, too large a number adds noise; 0.1, 0.3 and 1 are worth trying.
        restart: T_r, after how many steps the gradient is released anew; below 1 as a share of the run; by default
            never. 1 is DP-SGD.
        share: The share of the budget that the gradients take, in (0, 1); the differences take the rest.
        common: What all private methods take; ``sampling`` is ``full``.

    Raises:
        ConfigurationError: An option is out of range.

    Guarantees:
        Both points of a difference see the same random numbers (dropout). The noise of a whole run costs as much as
        that of DP-SGD with the same noise multiplier.

    Deviations:
        The records are those of one site, however many ranks share them: P = 1 client. Weight decay belongs in the
        optimizer; in the loss it would be clipped with each sample. After a step that moves nothing the gradient
        stays, and the step counts as if it had been released anew.

    Example:
        >>> method = DIFF2(noise=52.7594, restart=50)
        >>> run = PrivateHorizon(records=1000, batch=1000, steps=200)
        >>> [round(method.noise_at(step, 52.7594, run), 2) for step in (0, 1, 49, 50)]
        [10.55, 73.86, 73.86, 10.55]

    Reference:
        Murata and Suzuki, 2023, "DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex
        Distributed Learning", ICML, arXiv:2302.03884, Algorithm 1 with gradient descent.
    """

    traits: ClassVar[Traits] = Traits(
        rule="v = v + (sum_i clip(g_i(x) - g_i(x'), C2 |x - x'|) + noise) / n",
        paper=(
            "Murata, Suzuki, 2023, DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex "
            "Distributed Learning, arXiv:2302.03884"
        ),
        state=2,
        extra_evaluations=1,
        needs_per_sample_gradients=True,
        claim=Claim(
            sentence="over many rounds, a smaller gradient than DP-GD's at the same epsilon",
            baseline="dp_sgd",
            problems=("private_logistic",),
            options={"epsilon": 1.0, "clip_norm": 1.2, "smoothness": 0.6},
            baseline_options={"epsilon": 1.0, "clip_norm": 1.2, "sampling": "full"},
        ),
    )
    samplings: ClassVar[tuple[str, ...]] = ("full",)

    def __init__(
        self,
        *,
        clip_norm: float = 1.0,
        smoothness: float = 0.3,
        restart: int | float | None = None,
        share: float = 0.5,
        **common: Any,
    ) -> None:
        positive(clip_norm=clip_norm)
        _check_restart(restart)
        super().__init__(clip_norm=clip_norm, smoothness=smoothness, share=share, **common)
        self.clip_norm, self.restart = clip_norm, restart

    @property
    def clipping(self) -> str:
        return f"flat, norm {self.clip_norm:g}; differences at {self.smoothness:g} times the distance of the iterates"

    def period(self, horizon: PrivateHorizon) -> int:
        if self.restart is None:
            return horizon.steps
        return int(self.restart) if self.restart >= 1 else max(1, round(self.restart * horizon.steps))

    def radius(self, moved: float) -> float:
        return self.smoothness * moved


def _check_restart(restart: float | None) -> None:
    if restart is None:
        return
    between(0.0, float("inf"), closed="neither", restart=restart)
    if restart >= 1:
        at_least(1, restart=restart)  # type: ignore[arg-type]
