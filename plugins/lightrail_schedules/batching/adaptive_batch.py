"""AdAdaGrad's batches: they grow when the gradient drowns in its own noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightrail import Batching, Claim, Closure, Extent, Portion, Traits
from lightrail.errors import CompositionError
from lightrail.options import at_least, one_of, positive
from lightrail_schedules.batching.filled import require_filled
from lightrail_schedules.batching.rate import RULES, rate_factor

__all__ = ["AdaptiveBatch", "GradientNoise", "batch_size_wanted", "gradient_noise"]

TESTS = ("norm", "inner_product", "augmented")


@dataclass(frozen=True)
class GradientNoise:
    """What a batch says of the gradients of its samples.

    Args:
        norm_squared: ``||ḡ||²`` of the batch's mean gradient ḡ.
        variance: ``Σ_j Var((g_i)_j)``, unbiased, of one sample's gradient.
        along: ``Var(<g_i, ḡ>)``.
        across: ``Var`` of what of ``g_i`` is orthogonal to ḡ, summed over coordinates.
    """

    norm_squared: float
    variance: float
    along: float
    across: float


def gradient_noise(gradients: Sequence[Sequence[Tensor]], samples: int = 1) -> GradientNoise:
    """The noise of one sample's gradient, from the mean gradients of k disjoint groups of samples.

    Args:
        gradients: k >= 2 groups; in each one tensor a parameter.
        samples: In a group. A mean over s samples has a variance s times smaller, which is put right.

    Example:
        >>> rows = [[torch.tensor(g)] for g in ([1.0, 0.0], [3.0, 0.0], [2.0, 2.0], [2.0, -2.0])]
        >>> noise = gradient_noise(rows)
        >>> round(noise.variance, 7), noise.norm_squared
        (3.3333333, 4.0)
    """
    k = len(gradients)
    gram = torch.zeros(k, k, dtype=torch.float64)
    for column in zip(*gradients, strict=True):
        rows = torch.stack([each.detach().flatten() for each in column]).float()
        gram += (rows @ rows.T).double().cpu()
    # <g_i, ḡ>, ||ḡ||², and from them ||g_i - ḡ||²: the Gram matrix holds all that is needed.
    along = gram.mean(1)
    norm_squared = float(along.mean())
    deviations = gram.diagonal() - 2 * along + norm_squared
    variance = float(deviations.sum()) / (k - 1)
    along_variance = float((along - norm_squared).square().sum()) / (k - 1)
    parallel = along_variance / norm_squared if norm_squared > 0 else 0.0
    return GradientNoise(
        norm_squared, samples * max(variance, 0.0), samples * along_variance, samples * max(variance - parallel, 0.0)
    )


def batch_size_wanted(noise: GradientNoise, test: str, eta: float, theta: float, nu: float) -> float:
    """The batch at which the test would hold: with b samples, the variance of their mean is a b-th.

    norm: ``Σ Var / (eta² ||ḡ||²)``; inner_product: ``Var <g, ḡ> / (theta² ||ḡ||⁴)``; augmented: the larger of that
    and ``Var of the orthogonal part / (nu² ||ḡ||²)``. Infinite where ḡ is zero and the noise is not.

    Example:
        >>> noise = GradientNoise(norm_squared=4.0, variance=10 / 3, along=0.0, across=0.0)
        >>> round(batch_size_wanted(noise, "norm", eta=0.25, theta=0.5, nu=1.0), 2)
        13.33
    """

    def ratio(above: float, below: float) -> float:
        return above / below if below > 0 else math.inf if above > 0 else 0.0

    square = noise.norm_squared
    if test == "norm":
        return ratio(noise.variance, eta**2 * square)
    along = ratio(noise.along, theta**2 * square**2)
    return along if test == "inner_product" else max(along, ratio(noise.across, nu**2 * square))


class AdaptiveBatch(Batching):
    """Small batches as long as their gradient is clear, larger ones as it drowns in noise.

    ``b <- max(b, ⌈Σ_j Var((g_i)_j) / (eta² ||ḡ||²)⌉)``, tested every few steps; it never shrinks.

    Args:
        start: The first batch, over all devices, >= 1; ``None`` for the data's own.
        max_batch: The largest, >= 1; ``None`` for a quarter of the data.
        test: ``norm``: of the whole gradient; ``inner_product``: along it only, which grows later; ``augmented``: that,
            and across it.
        eta: Of the norm test, > 0: the noise that is allowed, relative to the gradient; smaller grows sooner.
        theta: Of the inner-product test, > 0.
        nu: Of the orthogonality test, > 0.
        every: Steps from one test to the next, >= 1.
        groups: Parts of the step whose gradients are compared, >= 2; ``None`` for single samples, as in the paper.
        lr_rule: How the learning rate answers: times ``b/b0`` (linear), its root (sqrt), 1 (none), or what the
            optimizer calls for (auto); b0 is the data's own batch.
        micro_batch: Samples that a device evaluates at once at most; ``None`` for as many as fit. The batch grows by
            accumulation beyond.

    Raises:
        ConfigurationError: An option out of range.
        CompositionError: ``max_batch`` is larger than the data, or smaller than ``start``.

    Guarantees:
        The batch is the same on all ranks, since the gradients that are compared are averaged over them.

    Deviations:
        The paper tests with the gradient of every sample, which costs as many backward passes as there are samples.
        Here the means of ``groups`` parts are compared, whose variance times their size is an unbiased estimate of the
        same: one pass over the batch at each test, ``1/every`` of a step. ``groups=null`` is the paper's. The paper's
        code returns the size of the test's own micro-batch where the test holds; here the batch stays.

    Example:
        >>> batching = AdaptiveBatch(start=8, max_batch=64)
        >>> batching.next(samples=0, step=0).samples
        8

    Reference:
        Lau, Liu and Kolar, 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods",
        arXiv:2402.11215, section 3.
    """

    traits = Traits(
        rule="b = max(b, Var(g) / (eta² ||g||²))",
        paper=(
            "Lau, Liu, Kolar, 2024, AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods, "
            "arXiv:2402.11215"
        ),
        claim=Claim(
            sentence="the loss of small batches after half of their steps",
            baseline="constant",
            baseline_options={"batch_size": 16},
            steps=0.5,
            problems=("digits_run",),
            options={"start": 16, "max_batch": 256, "lr_rule": "auto"},
        ),
        needs_groups=True,
        watches_gradient=True,
        example={"start": 16, "max_batch": 64, "every": 1, "groups": 4},
    )

    def __init__(
        self,
        start: int | None = None,
        max_batch: int | None = None,
        test: str = "norm",
        eta: float = 0.5,
        theta: float = 0.5,
        nu: float = 1.0,
        every: int = 10,
        groups: int | None = 8,
        lr_rule: str = "none",
        micro_batch: int | None = None,
    ) -> None:
        one_of(TESTS, test=test)
        one_of(RULES, lr_rule=lr_rule)
        positive(eta=eta, theta=theta, nu=nu)
        at_least(1, every=every)
        for name, value, least in (("start", start, 1), ("max_batch", max_batch, 1), ("groups", groups, 2)):
            if value is not None:
                at_least(least, **{name: value})
        super().__init__(micro_batch)
        self.start, self.max_batch, self.test = start, max_batch, test
        self.eta, self.theta, self.nu = eta, theta, nu
        self.every, self.groups, self.lr_rule = every, groups, lr_rule
        self.batch_size = start or 0
        self._extent: Extent | None = None
        self._steps = 0
        self._wanted = math.nan

    def begin(self, extent: Extent) -> None:
        self._extent = extent
        if self.max_batch is None:
            self.max_batch = max(extent.data_size // 4, self.start or extent.batch_size)
        require_filled(extent, **{"batching.max_batch": self.max_batch})
        start = self.start or min(extent.batch_size, self.max_batch)
        if start > self.max_batch:
            raise CompositionError(
                "the batch starts larger than it may become",
                found=f"batching.start={start}, batching.max_batch={self.max_batch}",
                allowed="start <= max_batch",
                remedy="Lower batching.start or raise batching.max_batch.",
            )
        self.batch_size = max(self.batch_size, start)

    def next(self, samples: int, step: int) -> Portion:
        factor = 1.0 if self._extent is None else rate_factor(self.lr_rule, self.batch_size, self._extent)
        return Portion(self.batch_size, lr_factor=factor)

    def observe(self, params: list[Tensor], closure: Closure) -> None:
        self._steps += 1
        most = self.max_batch or math.inf
        if self._steps % self.every or self.batch_size >= most:
            return
        smallest = min(closure.batch_sizes())
        count = smallest if self.groups is None else min(self.groups, smallest)
        if count < 2:
            return  # a single sample says nothing of the noise
        noise = gradient_noise(closure.groups(count), max(1, closure.window_size() // count))
        self._wanted = batch_size_wanted(noise, self.test, self.eta, self.theta, self.nu)
        if math.isfinite(self._wanted) or self._wanted == math.inf:
            self.batch_size = int(min(most, max(self.batch_size, math.ceil(min(self._wanted, most)))))

    def logged(self) -> dict[str, float]:
        return {} if not math.isfinite(self._wanted) else {"batch_size_wanted": self._wanted}

    def state_dict(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "steps": self._steps, "wanted": self._wanted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batch_size, self._steps, self._wanted = state["batch_size"], state["steps"], state["wanted"]
