"""A gradient that is built from private differences: noise in proportion to how far the parameters moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import CompositionError, NonFiniteLoss
from lightrail.options import between, non_negative, positive
from lightrail.privacy import PrivacyMethod, PrivateHorizon, Release
from lightrail.privacy.events import Event
from lightrail.sample_gradients import SampleGradients
from lightrail_privacy.clipping import flat_factors

__all__ = ["GradientDifferences", "anchors_between", "clipped_sum", "distance", "shared_noise"]

_LEAST_RADIUS = 1e-15  # below it squares of differences vanish in single precision, and no norm could bound them


def clipped_sum(gradients: SampleGradients, radius: float) -> list[Tensor]:
    r"""The sum of what samples contribute, each shortened to a radius.

    .. math:: s = \sum_i g_i \min(1, R / \|g_i\|)

    Args:
        gradients: g, of the samples, or their differences between two points.
        radius: R, at least 0.

    Returns:
        s, one tensor a parameter; one sample moves it by R at most. Zeros where R = 0.

    Example:
        >>> from lightrail.sample_gradients.pieces import Piece
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> clipped_sum(SampleGradients([w], [[Piece(w, torch.tensor([[3.0, 4.0], [0.0, 0.1]]))]]), 0.5)
        [tensor([0.3000, 0.5000])]
    """
    norms = gradients.norms()
    return gradients.weighted_sum(flat_factors(norms, radius) if radius else torch.zeros_like(norms))


def distance(w: Sequence[Tensor], w_before: Sequence[Tensor]) -> float:
    r"""How far the parameters moved, :math:`\|w_t - w_{t-1}\|_2` over all of them.

    Args:
        w: Parameters.
        w_before: The same, before.

    Returns:
        The distance, in single precision at least.

    Raises:
        CompositionError: They are not the same parameters.
        NonFiniteLoss: The distance is not finite.

    Example:
        >>> distance([torch.tensor([3.0]), torch.tensor(4.0)], [torch.tensor([0.0]), torch.tensor(0.0)])
        5.0
    """
    if [p.shape for p in w] != [p.shape for p in w_before]:
        raise CompositionError(
            "which parameters are trained has changed, and a difference of gradients needs the same at both points",
            found=f"{len(w_before)} tensors in the step before, {len(w)} now",
            allowed="the same parameters in all steps",
            remedy="Train them all from the start, or use privacy=dp_sgd, which takes every step by itself.",
        )
    norms = [torch.linalg.vector_norm(_wide(p) - _wide(q.to(p.device))) for p, q in zip(w, w_before, strict=True)]
    moved = float(torch.stack([norm.to(norms[0].device) for norm in norms]).norm()) if norms else 0.0
    if not math.isfinite(moved):
        raise NonFiniteLoss(
            "the parameters are not finite any more",
            found=f"a distance of {moved} between two steps",
            allowed="finite parameters",
            remedy="Lower optimizer.lr; noise of high dimension asks for smaller steps than plain gradients do.",
        )
    return moved


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.dtype.itemsize < 4 else tensor.detach()


def anchors_between(first: int, end: int, period: int) -> int:
    r"""How many of the steps from ``first`` to ``end - 1`` are anchors, which come every ``period`` steps from 0 on.

    .. math:: \lceil \mathrm{end} / p \rceil - \lceil \mathrm{first} / p \rceil

    Example:
        >>> anchors_between(0, 200, 50), anchors_between(1, 50, 50), anchors_between(0, 101, 50)
        (4, 0, 3)
    """
    return -(-end // period) - -(-first // period)


def shared_noise(
    noise: float, steps: int, anchors: int, share: float, rates: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    r"""The noise multipliers of anchors and of differences, each of which may spend its share of the budget.

    .. math::
        z_k = z \frac{a_k}{a}, \qquad a_k = \frac{\max(1, q_k \sqrt{R_k})}{\sqrt{s_k}}, \qquad a = \max(1, q_1 \sqrt{R})

    With all records in every step (q = 1) this is :math:`z_k = z \sqrt{R_k / (s_k R)}`, and
    :math:`R_1 / z_1^2 + R_2 / z_2^2 = R / z^2`: R steps of z cost as much.

    Args:
        noise: z, at least 0.
        steps: R, those of both kinds, at least 1.
        anchors: R_1, from 1 to R; R_2 = R - R_1 are the differences.
        share: s_1, in (0, 1); s_2 = 1 - s_1. With anchors alone theirs is all.
        rates: q_1 and q_2, the chances of a record to take part in a step of each kind, in (0, 1].

    Returns:
        z_1 and z_2; the second is infinite where there are no differences.

    Deviations:
        For q < 1 the ratio is that of the closed forms of Arora et al., which hold up to constants; what both cost
        together is left to the accountant.

    Example:
        >>> mu = 0.268051  # what epsilon = 1 and delta = 1e-5 allow
        >>> [round(z, 3) for z in shared_noise(math.sqrt(200) / mu, steps=200, anchors=4, share=0.5)]
        [10.552, 73.863]

    Reference:
        Murata and Suzuki, 2023, arXiv:2302.03884, Algorithm 1; Arora et al., 2023, arXiv:2206.00846, Theorem 4.1.
    """
    differences = steps - anchors
    if not differences:
        return noise, math.inf
    both = ((anchors, share, rates[0]), (differences, 1 - share, rates[1]))
    a_1, a_2 = (max(1.0, q * math.sqrt(R)) / math.sqrt(s) for R, s, q in both)
    a = max(1.0, rates[0] * math.sqrt(steps))
    return noise * a_1 / a, noise * a_2 / a


class GradientDifferences(PrivacyMethod):
    r"""What methods have in common that release a gradient at anchors, and between them how it changed.

    .. math::
        v_t = \tfrac{1}{b_1} \left(\sum_i \mathrm{clip}(g_i(w_t), C) + z_1 C \xi\right) \text{ at anchors}, \qquad
        v_t = v_{t-1} + \tfrac{1}{b_2} \left(\sum_i \mathrm{clip}(g_i(w_t) - g_i(w_{t-1}), R_t) + z_2 R_t \xi\right)

    A radius R_t follows from iterates, which are released: it is no secret. Where two iterates coincide it is 0, and
    nothing of the data is released; the step is accounted for as planned all the same.

    Args:
        clip_norm: C, greater than 0.
        smoothness: By how much the gradient of a sample changes with the parameters, greater than 0.
        share: Of the budget, for the anchors, in (0, 1).
        common: What all private methods take.
    """

    def __init__(self, *, clip_norm: float, smoothness: float, share: float, **common: Any) -> None:
        super().__init__(**common)
        positive(smoothness=smoothness)
        between(0.0, 1.0, closed="neither", share=share)
        self._C, self.smoothness, self.share = clip_norm, smoothness, share
        self._v: list[Tensor] = []
        self._w_before: list[Tensor] = []
        self._radius: float | None = None
        self._step = 0

    def period(self, horizon: PrivateHorizon) -> int:
        """Steps from one anchor to the next, at least 1; step 0 is one."""
        raise NotImplementedError

    def radius(self, moved: float) -> float:
        """How long a sample's difference may be after the parameters moved so far; 0 for 0."""
        raise NotImplementedError

    @property
    def assumptions(self) -> list[str]:
        return [
            "The radii of differences follow from the parameters of all steps, which count as released; random "
            "numbers (dropout) are the same at both points.",
        ]

    def prepare(self, horizon: PrivateHorizon) -> None:
        self._horizon = horizon

    def noise_at(self, step: int, noise: float, horizon: PrivateHorizon) -> float:
        non_negative(noise=noise)
        return self._both_noises(noise, horizon)[1 if step % self.period(horizon) else 0]

    def _both_noises(self, noise: float, horizon: PrivateHorizon) -> tuple[float, float]:
        period = self.period(horizon)
        q_1, q_2 = (self.batch_at(step, horizon) / horizon.records for step in (0, min(1, period - 1)))
        anchors = anchors_between(0, horizon.steps, period)
        return shared_noise(noise, horizon.steps, anchors, self.share, (q_1, q_2))

    def events(self, noise: float, horizon: PrivateHorizon, first: int = 0) -> list[Event]:
        # Kind by kind rather than in their order, which costs the same: a run may have many phases.
        anchors = anchors_between(first, horizon.steps, self.period(horizon))
        counts = (anchors, horizon.steps - first - anchors)
        return [
            Event(z, count, self.batch_at(step, horizon), horizon.records)
            for step, (z, count) in enumerate(zip(self._both_noises(noise, horizon), counts, strict=True))
            if count
        ]

    # The step.

    def elsewhere(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        if self._step % self.period(self._horizon) == 0:
            self._radius = None
            return None
        radius = self.radius(distance(params, self._w_before))
        self._radius = radius if radius >= _LEAST_RADIUS else 0.0
        if not self._radius:
            return None
        self._w_before = [q.to(p.device) for p, q in zip(params, self._w_before, strict=True)]
        return self._w_before

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        if self._radius is None:
            return clipped_sum(here, self._C)
        return clipped_sum(here if there is None else here.minus(there), self._radius)

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        is_anchor = self._radius is None
        sensitivity = self._C if self._radius is None else self._radius
        noise = self.noise_at(release.step, release.noise, release.horizon)
        change = [each / release.batch for each in release(sums, sensitivity=sensitivity, noise=noise)]
        self._v = change if is_anchor else [v.to(d.device) + d for v, d in zip(self._v, change, strict=True)]
        self._w_before = [p.detach().clone() for p in params]
        self._step = release.step + 1
        # What is handed out becomes .grad, which optimizers and clipping change in place.
        return [v.clone() for v in self._v]

    def logged(self) -> dict[str, float]:
        return {} if self._radius is None else {"radius": self._radius}

    def state_dict(self) -> dict[str, Any]:
        return {"v": self._v, "w_before": self._w_before, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._v, self._w_before, self._step = list(state["v"]), list(state["w_before"]), state["step"]
