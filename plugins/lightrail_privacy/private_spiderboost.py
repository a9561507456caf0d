"""Private SpiderBoost: a gradient of a large batch now and then, and private differences on small ones in between."""

from __future__ import annotations

from typing import Any, ClassVar

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, positive
from lightrail.privacy import PrivateHorizon
from lightrail.traits import Claim, Traits
from lightrail_privacy.gradient_differences import GradientDifferences

__all__ = ["PrivateSpiderBoost"]

_ANCHOR = 16  # times the data's batch: what the paper's experiments have


class PrivateSpiderBoost(GradientDifferences):
    r"""Releases the gradient of a large batch once a phase, and on small batches how the gradient changed since.

    .. math::
        \nabla_t = \tfrac{1}{b_1} \left(\sum_{i \in S_t} \mathrm{clip}(g_i(w_t), L_0) + z_1 L_0 \xi\right)
        \text{ if } t \bmod p = 0, \qquad
        \nabla_t = \nabla_{t-1} + \tfrac{1}{b_2} \left(\sum_{i \in S_t} \mathrm{clip}(g_i(w_t) - g_i(w_{t-1}), R_t)
        + z_2 R_t \xi\right) \text{ otherwise}, \qquad R_t = \min(L_1 \|w_t - w_{t-1}\|, 2 L_0)

    with Poisson batches S_t of b_1 records expected at an anchor, and b_2, the data's own batch size, elsewhere. The
    noise of a difference grows with the step that it follows, so that large steps make the next gradient larger: with
    many parameters, short phases and small learning rates.

    Args:
        lipschitz: L_0, the largest norm of a sample's gradient, greater than 0.
        smoothness: L_1, the largest change of a sample's gradient for a step of length 1, greater than 0. Too small a
            number loses part of the change, too large a number adds noise.
        phase: p, steps from one anchor to the next, at least 1; 1 is DP-SGD on batches of b_1.
        anchor_batch: b_1, at least 1 and at most all records; by default 16 times the data's batch size, or all.
        share: The share of the budget that the anchors take, in (0, 1), to first order.
        common: What all private methods take.

    Raises:
        ConfigurationError: An option is out of range.

    Guarantees:
        Both points of a difference see the same records and the same random numbers (dropout). With
        ``sampling=full`` it is DIFF2 with ``restart=p``, but for the bound 2 L_0.

    Deviations:
        The noises are calibrated by the accountant rather than set by the closed forms of the paper, of which only
        the ratio is kept. Trained are all steps, and the last iterate is the result; the paper returns one that is
        drawn at random. After a step that moves nothing the gradient stays, and the step counts as if it had been
        released anew. Weight decay belongs in the optimizer; in the loss it would be clipped with each sample.

    Example:
        >>> method = PrivateSpiderBoost(phase=10)
        >>> run = PrivateHorizon(records=6000, batch=64, steps=100)
        >>> [method.batch_at(step, run) for step in (0, 1, 9, 10)]
        [1024, 64, 64, 1024]

    Reference:
        Arora, Bassily, González, Guzmán, Menart and Ullah, 2023, "Faster Rates of Convergence to Stationary Points in
        Differentially Private Optimization", ICML, arXiv:2206.00846, Algorithm 2.
    """

    traits: ClassVar[Traits] = Traits(
        rule="v = v + (sum_i clip(g_i(w) - g_i(w'), min(L1 |w - w'|, 2 L0)) + noise) / b",
        paper=(
            "Arora, Bassily, González, Guzmán, Menart, Ullah, 2023, Faster Rates of Convergence to Stationary Points "
            "in Differentially Private Optimization, arXiv:2206.00846"
        ),
        state=2,
        extra_evaluations=1,
        needs_per_sample_gradients=True,
        claim=Claim(
            sentence="a lower loss than DP-SGD's at the same epsilon",
            baseline="dp_sgd",
            problems=("private_digits",),
            options={"epsilon": 3.0, "phase": 10},
            baseline_options={"epsilon": 3.0},
        ),
    )
    samplings: ClassVar[tuple[str, ...]] = ("poisson", "full")

    def __init__(
        self,
        *,
        lipschitz: float = 1.0,
        smoothness: float = 1.0,
        phase: int = 50,
        anchor_batch: int | None = None,
        share: float = 0.5,
        **common: Any,
    ) -> None:
        positive(lipschitz=lipschitz)
        at_least(1, phase=phase)
        if anchor_batch is not None:
            at_least(1, anchor_batch=anchor_batch)
        super().__init__(clip_norm=lipschitz, smoothness=smoothness, share=share, **common)
        self.lipschitz, self.phase, self.anchor_batch = lipschitz, int(phase), anchor_batch

    @property
    def clipping(self) -> str:
        return (
            f"flat, norm {self.lipschitz:g}; differences at {self.smoothness:g} times the distance of the iterates, "
            f"{2 * self.lipschitz:g} at most"
        )

    def prepare(self, horizon: PrivateHorizon) -> None:
        super().prepare(horizon)
        least = horizon.records if self.sampling == "full" else 1
        if self.anchor_batch is not None and not least <= self.anchor_batch <= horizon.records:
            raise ConfigurationError(
                "a batch at an anchor cannot have so many records",
                found=f"privacy.anchor_batch={self.anchor_batch} with privacy.sampling={self.sampling}",
                allowed=f"{horizon.records:,}, as many as there are" if least > 1 else f"1 to {horizon.records:,}",
                remedy="Leave privacy.anchor_batch out, or choose privacy.sampling=poisson and a batch in that range.",
            )

    def batch_at(self, step: int, horizon: PrivateHorizon) -> int:
        if self.sampling == "full":
            return horizon.records
        if step % self.phase:
            return horizon.batch
        return self.anchor_batch or min(_ANCHOR * horizon.batch, horizon.records)

    def period(self, horizon: PrivateHorizon) -> int:
        return self.phase

    def radius(self, moved: float) -> float:
        return min(self.smoothness * moved, 2 * self.lipschitz)
