"""m-NGP: full batches of gradients that are divided by max{1, norm}, with Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightrail.privacy import PrivacyMethod, Release
from lightrail.sample_gradients import SampleGradients
from lightrail.traits import Claim, Traits
from lightrail_privacy.clipping import flat_factors

__all__ = ["NGP"]

_NORM = 1.0  # at which the paper's max{1, .} begins to normalise


class NGP(PrivacyMethod):
    r"""Divides every sample's gradient by max{1, its norm}, and adds Gaussian noise to the mean over all samples.

    .. math:: g = \frac1n \Big(\sum_{i=1}^n \frac{g_i}{\max\{1, \|g_i\|\}} + z \, \mathcal{N}(0, I)\Big)

    This is ``dp_sgd`` with flat clipping at the norm 1, and with every record in every step.

    Args:
        common: The options that all private methods share.

    Deviations:
        Each sample's gradient is normalised; the norm of the mean gradient, which the notation of the paper also
        allows, would bound nothing. The noise is calibrated by the accountant, in place of the paper's constants.

    Example:
        >>> NGP(noise=2.0).sampling, NGP(noise=2.0).clipping
        ('full', 'max{1, norm}-normalised')

    Reference:
        Y. Kang, Y. Liu, J. Li and W. Wang (2022), Sharper Utility Bounds for Differentially Private Models, arXiv
        2204.10536, m-NGP.
    """

    traits: ClassVar[Traits] = Traits(
        rule="g = (Σ g_i / max{1, ‖g_i‖} + z N(0, I)) / n",
        paper="Y. Kang, Y. Liu, J. Li, W. Wang, 2022, Sharper Utility Bounds for Differentially Private Models, arXiv "
        "2204.10536",
        state=0,
        needs_per_sample_gradients=True,
        claim=Claim(
            sentence="a lower loss than with noise for the longest gradient that there can be",
            baseline="dp_sgd",
            problems=("private_digits",),
            options={"epsilon": 3.0},
            # No gradient of this loss is longer than √2 √(1 + 64), where pixels lie in [0, 1].
            baseline_options={"epsilon": 3.0, "sampling": "full", "clip_norm": 11.4},
        ),
    )
    samplings: ClassVar[tuple[str, ...]] = ("full",)

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)

    @property
    def clipping(self) -> str:
        return "max{1, norm}-normalised"

    def contribution(self, here: SampleGradients, there: SampleGradients | None) -> list[Tensor]:
        return here.weighted_sum(flat_factors(here.norms(), _NORM))

    def gradient(self, sums: list[Tensor], params: Sequence[Tensor], release: Release) -> list[Tensor]:
        noisy = release(sums, sensitivity=_NORM, noise=release.noise)
        torch._foreach_div_(noisy, float(release.batch))
        return noisy
