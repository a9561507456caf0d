"""Clipping of the largest coordinates of the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import between, one_of
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.dense_gradients import dense_gradients
from lightrail_optimizers.tensor_lists import refuse_complex, refuse_sharded
from lightrail_optimizers.transforms.clip_value import clip_coordinates

__all__ = ["CoordinateClip", "magnitude_quantile"]


def magnitude_quantile(g: Tensor, q: float) -> Tensor:
    """The q-quantile of ``|g|`` by linear interpolation between the two nearest ranks.

    With n sorted magnitudes ``a_0 <= … <= a_{n-1}`` it is ``a`` at the position ``q (n-1)``, linear in between. One
    selection rather than a sort: linear time, and no limit on the number of entries.

    Args:
        g: Any shape, not empty.
        q: Between 0 and 1.

    Returns:
        A 0-d tensor, in single precision at least.

    Example:
        >>> round(magnitude_quantile(torch.arange(1.0, 11.0), 0.9).item(), 6)
        9.1
    """
    magnitudes = g.detach().abs().flatten()
    magnitudes = magnitudes.to(torch.promote_types(g.dtype, torch.float32))
    position = q * (magnitudes.numel() - 1)
    low = math.floor(position)
    below, above = _neighbours(magnitudes, low)
    return below if low == position else below.lerp(above, position - low)


def _neighbours(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The entries of the given rank, from 0, and of the next one; of the last rank twice."""
    if a.device.type == "cpu":
        # NumPy's selection is ten times as fast as torch's on a processor.
        parted = torch.from_numpy(np.partition(a.numpy(), rank))
        return parted[rank], parted[rank + 1 :].min() if rank + 1 < len(parted) else parted[rank]
    below = a.kthvalue(rank + 1).values
    # The next rank holds the same value again, or else the least one above: no second selection is needed.
    is_above = a > below
    is_last = is_above.sum() == 0
    is_repeated = is_above.sum() < a.numel() - rank - 1
    return below, torch.where(is_repeated | is_last, below, a.masked_fill(~is_above, math.inf).min())


class CoordinateClip(Transform):
    """Clips each coordinate of the gradient by itself: a few of them cause most of the trouble.

    ``g_i = sign(g_i) min(|g_i|, tau)``; tau is given, or the q-quantile of ``|g|``, so that a fraction 1-q is clipped.

    Args:
        threshold: tau, > 0; ``inf`` clips nothing. Give this or ``quantile``; without either, ``quantile=0.9``.
        quantile: q, between 0 and 1, by linear interpolation: 0.9 of the magnitudes 1, 2, …, 10 is 9.1, which clips
            the 10 alone. 1 clips nothing.
        scope: ``tensor``: one quantile a parameter; ``global``: one over all of them, which copies the gradient.

    Raises:
        ConfigurationError: Both ``threshold`` and ``quantile``, an option out of range, a complex parameter, a
            sparse gradient, or a quantile of tensors that are cut over several devices.

    Deviations:
        The paper clips a small fraction of coordinates without fixing how the quantile is read; the convention is the
        one above. It also clips the update of Adam; here the gradient is clipped, whatever the optimizer.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [CoordinateClip(threshold=1.0)])
        >>> loss = optimizer.step(Closure(lambda: (w * torch.tensor([-3.0, 0.5])).sum(), [w]))
        >>> w.tolist()
        [1.0, -0.5]

    Reference:
        Pan and Li, 2023, "Toward Understanding Why Adam Converges Faster Than SGD for Transformers",
        arXiv:2306.00204, section on coordinate-wise clipping.
    """

    traits = Traits(
        rule="g_i = sign(g_i) min(|g_i|, tau)",
        paper=(
            "Pan, Li, 2023, Toward Understanding Why Adam Converges Faster Than SGD for Transformers, arXiv:2306.00204"
        ),
        state=0,
        needs_whole_tensors=True,
        example={"quantile": 0.9},
    )

    def __init__(self, threshold: float | None = None, quantile: float | None = None, scope: str = "tensor") -> None:
        if threshold is None and quantile is None:
            quantile = 0.9
        if threshold is not None and quantile is not None:
            raise ConfigurationError(
                "coordinate_clip takes a threshold or a quantile, not both",
                found=f"threshold={threshold}, quantile={quantile}",
                allowed="one of the two",
                remedy="Leave out one of them.",
            )
        if threshold is not None:
            between(0.0, math.inf, closed="right", threshold=threshold)
        if quantile is not None:
            between(0.0, 1.0, closed="both", quantile=quantile)
        one_of(("tensor", "global"), scope=scope)
        self.threshold = threshold
        self.quantile = quantile
        self.scope = scope
        self._thresholds: list[Tensor] = []

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Quantiles are of whole tensors; a threshold that is given is not."""
        return dataclasses.replace(CoordinateClip.traits, needs_whole_tensors=options.get("threshold") is None)

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        refuse_complex("coordinate_clip", params)
        _, gradients = dense_gradients("coordinate_clip", params)
        if self.threshold is not None:
            for g in gradients:
                clip_coordinates(g, self.threshold)
        elif self.quantile is not None and self.quantile < 1.0 and gradients:
            refuse_sharded("coordinate_clip", params)
            self._thresholds = self._quantiles(gradients, self.quantile)
            for g, tau in zip(gradients, self._thresholds, strict=True):
                clip_coordinates(g, tau)

    def logged(self) -> dict[str, float]:
        return {"largest_threshold": max(map(float, self._thresholds))} if self._thresholds else {}

    def _quantiles(self, gradients: Sequence[Tensor], q: float) -> list[Tensor]:
        if self.scope == "tensor":
            return [magnitude_quantile(g, q) for g in gradients]
        first = gradients[0].device
        everything = torch.cat([g.detach().flatten().to(first) for g in gradients])
        return [magnitude_quantile(everything, q)] * len(gradients)
