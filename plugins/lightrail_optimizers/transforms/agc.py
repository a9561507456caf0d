"""Adaptive gradient clipping: each unit's gradient by the length of its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrail.errors import ConfigurationError
from lightrail.options import between, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.dense_gradients import dense_gradients
from lightrail_optimizers.tensor_lists import refuse_complex

__all__ = ["AGC", "clip_by_weights_", "unit_norms"]


def unit_norms(x: Tensor) -> Tensor:
    """The norm of each slice along the first axis; of the whole tensor where but one axis is longer than 1.

    Args:
        x: Any shape; the first axis counts the units.

    Returns:
        Norms that broadcast against ``x``, in single precision at least.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist()
        [[5.0], [2.0]]
        >>> unit_norms(torch.tensor([3.0, 4.0])).tolist()
        5.0
    """
    is_vector = sum(length > 1 for length in x.shape) <= 1
    axes = None if is_vector else tuple(range(1, x.dim()))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dim=axes, keepdim=not is_vector, dtype=dtype)


def clip_by_weights_(w: Tensor, g: Tensor, clipping: float, eps: float) -> Tensor:
    """``g_i *= min(1, clipping max(||w_i||, eps) / ||g_i||)`` for each unit i, in place.

    Args:
        w: Weights.
        g: Their gradient.
        clipping: The largest ratio of norms, > 0.
        eps: The least norm that weights count with, > 0.

    Returns:
        The factors, one a unit.

    Example:
        >>> w, g = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [0.5, 0.0]])
        >>> clip_by_weights_(w, g, clipping=0.5, eps=1e-3).flatten().tolist()
        [0.25, 1.0]
        >>> g.tolist()
        [[1.5, 2.0], [0.5, 0.0]]
    """
    factor = (clipping * unit_norms(w).clamp(min=eps) / unit_norms(g)).clamp(max=1.0)
    g.mul_(factor)
    return factor


class AGC(Transform):
    """Clips the gradient of each unit to a fraction of the length of its weights: adaptive gradient clipping.

    ``g_i *= min(1, clipping max(||w_i||, eps) / ||g_i||)``. A unit is a slice along the first axis: the row of a
    linear layer, the filter of a convolution; a bias or another vector is one unit.

    Args:
        clipping: The largest ratio of norms, > 0; ``inf`` clips nothing. The larger the batch, the smaller: 0.01 is
            the paper's for batches of 4096.
        eps: The least norm that weights count with, > 0, so that those that begin at zero can move.
        exclude: Patterns, in the manner of file names, of parameters that are left alone: of a dotted name or of one
            of its parts. The paper leaves out the last linear layer: ``["head"]``, say.

    Raises:
        ConfigurationError: An option out of range, a pattern that no parameter's name matches, a complex parameter,
            or a sparse gradient.

    Guarantees:
        A unit within the bound is untouched, bit for bit. One that is not finite stays so.

    Deviations:
        Without ``exclude`` the last linear layer is clipped like any other.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([[30.0, 40.0], [6.0, 8.0]]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [AGC(clipping=0.1)])
        >>> loss = optimizer.step(Closure(lambda: (w**2).sum() / 2, [w]))
        >>> [[round(value, 4) for value in row] for row in w.tolist()]
        [[27.0, 36.0], [5.4, 7.2]]

    Reference:
        Brock, De, Smith and Simonyan, 2021, "High-Performance Large-Scale Image Recognition Without Normalization",
        arXiv:2102.06171, section 4.1, equation 3.
    """

    traits = Traits(
        rule="g_i *= min(1, clipping max(||w_i||, eps) / ||g_i||) for each unit i",
        paper=(
            "Brock, De, Smith, Simonyan, 2021, High-Performance Large-Scale Image Recognition Without Normalization, "
            "arXiv:2102.06171"
        ),
        state=0,
        example={"clipping": 0.01},
    )

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()) -> None:
        between(0.0, math.inf, closed="right", clipping=clipping)
        positive(eps=eps)
        self.clipping = clipping
        self.eps = eps
        self.exclude = tuple(exclude)
        self._module: nn.Module | None = None
        self._excluded: set[int] = set()
        self._factors: list[Tensor] = []

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """Only with names to leave out does it need the module."""
        return dataclasses.replace(AGC.traits, needs_module=bool(options.get("exclude")))

    def attach(self, module: nn.Module) -> None:
        self._module = module

    def prepare(self, optimizer: Optimizer) -> None:
        self._excluded = {id(p) for pattern in self.exclude for p in _named(pattern, self._module)}
        self._module = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        refuse_complex("agc", params)
        clipped = (p for p in params if id(p) not in self._excluded)
        pairs = zip(*dense_gradients("agc", clipped), strict=True)
        self._factors = [clip_by_weights_(w, g, self.clipping, self.eps) for w, g in pairs]

    def logged(self) -> dict[str, float]:
        units = sum(factor.numel() for factor in self._factors)
        clipped = sum(int((factor < 1).sum()) for factor in self._factors)
        return {"clipped_units": clipped / units} if units else {}


def _named(pattern: str, module: nn.Module | None) -> Sequence[Tensor]:
    """The parameters whose dotted name, or a part of it, matches; at least one."""
    named = list(module.named_parameters()) if module is not None else []
    found = [p for name, p in named if any(fnmatchcase(each, pattern) for each in (name, *name.split(".")))]
    if not found:
        raise ConfigurationError(
            f"agc has nothing to leave out under the name '{pattern}'",
            found=", ".join(name for name, _ in named) or "no module: its `attach` was not called",
            allowed="patterns that match the name of a parameter, or a part of it between dots",
            remedy="Correct exclude; in a loop of your own, call attach(model) before the optimizer is made.",
        )
    return found
