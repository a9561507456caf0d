"""VRGD: coordinates move as far as the parts of the batch agree on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightrail.options import at_least, between
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.closure_answers import wide
from lightrail_optimizers.tensor_lists import global_norm, refuse_complex, refuse_sparse

__all__ = ["VRGD", "signal_to_noise"]


def signal_to_noise(groups: Sequence[Sequence[Tensor]], gamma: float) -> list[Tensor]:
    """``r = clip(q / mean(q), gamma, 1)`` with ``q = ḡ² / σ²``, the mean over the entries of one tensor.

    ``ḡ`` is the mean of the groups' gradients and ``σ² = mean(g_i²) - ḡ²`` their variance, entry by entry. An entry on
    which all groups agree, to rounding, has ``r = 1`` and no part in the mean.

    Args:
        groups: At least two lists of one gradient a parameter.
        gamma: The least ratio, in [0, 1].

    Returns:
        One tensor a parameter, in single precision at least.

    Example:
        >>> g = [[torch.tensor([1.0, 1.0])], [torch.tensor([1.2, -1.0])], [torch.tensor([0.8, 1.0])]]
        >>> [round(value, 4) for value in signal_to_noise([*g, [torch.tensor([1.0, -1.0])]], 0.1)[0].tolist()]
        [1.0, 0.1]
    """
    k = len(groups)
    first = wide(groups[0])
    # Differences to the first group: those of groups that are equal are zero, whatever their mean rounds to.
    offset = [torch.zeros_like(g) for g in first]
    square = [torch.zeros_like(g) for g in first]
    for group in groups[1:]:
        d = torch._foreach_sub(wide(group), first)
        torch._foreach_add_(offset, d, alpha=1 / k)
        torch._foreach_addcmul_(square, d, d, value=1 / k)
    variance = torch._foreach_sub(square, torch._foreach_mul(offset, offset))
    signal = torch._foreach_add(first, offset)
    torch._foreach_mul_(signal, signal)
    rounding = [
        max(64 * torch.finfo(s.dtype).eps, torch.finfo(g.dtype).eps) for s, g in zip(signal, groups[0], strict=True)
    ]
    return [_ratio(s, v, gamma, eps) for s, v, eps in zip(signal, variance, rounding, strict=True)]


def _ratio(signal: Tensor, variance: Tensor, gamma: float, rounding: float) -> Tensor:
    is_certain = variance <= rounding**2 * signal
    q = torch.where(is_certain, 0.0, signal / variance)
    mean = q.sum() / (~is_certain).sum()
    return torch.where(is_certain, 1.0, (q / mean.clamp_min(torch.finfo(q.dtype).tiny)).clamp_(gamma, 1.0))


class VRGD(Transform):
    """Shrinks the gradient where parts of the batch disagree about it: its ratio of signal to noise.

    ``q = ḡ² / σ²`` over the gradients of k parts of the batch, entry by entry; ``r = clip(q / mean(q), gamma, 1)``, the
    mean over each parameter's entries; ``g = r ḡ``. With a momentum, ``p = b3 p + (1-b3) r``; ``g = p / (1-b3^t) ḡ``.

    Made for large batches, whose parts are large too.

    Args:
        groups: k, at least 2. With few, σ² is itself mostly noise.
        gamma: The least that is left of an entry, in [0, 1]; 1 is the optimizer alone, bit for bit, at the price of one
            evaluation.
        momentum: b3 of the average of r over steps, in [0, 1): 0 around SGD, 0.9 around Adam and LAMB.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: A micro-batch has fewer samples than there are groups.

    Guarantees:
        Equal parts leave the gradient as it is. What is shrunk is the gradient that the transforms before this one
        made; the parts' own gradients are those of the loss. For a moment it holds k copies of the gradient.

    Deviations:
        Published as VR-SGD, VR-Adam, VR-LARS and VR-LAMB; the optimizer here is any. The ratio of an entry whose σ² is
        zero, to rounding, is not in the paper: 1, and outside the mean, for otherwise it would be all of the mean.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> samples = torch.tensor([[1.0, 1.0], [1.2, -1.0], [0.8, 1.0], [1.0, 0.0]])
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [VRGD(groups=4, gamma=0.1)])
        >>> loss = optimizer.step(Closure(lambda batch: (batch @ w).mean(), [w], samples))
        >>> [round(value, 4) for value in w.tolist()]
        [-1.0, -0.025]

    Reference:
        Jiang, Liu, Ding, Guo and Lin, 2023, "Accelerating Large Batch Training via Gradient Signal to Noise Ratio
        (GSNR)", arXiv:2309.13681: VR-SGD, and with a momentum VR-Adam.
    """

    traits = Traits(
        rule="r = clip(q / mean(q), gamma, 1), q = mean(g_i)² / var(g_i) over parts of the batch; g = r g",
        paper=(
            "Jiang, Liu, Ding, Guo, Lin, 2023, Accelerating Large Batch Training via Gradient Signal to Noise Ratio "
            "(GSNR), arXiv:2309.13681"
        ),
        state=0,
        extra_evaluations=1,
        needs_groups=True,
        example={"groups": 4},
    )

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        """An average of the ratios is a copy of the parameters; with ``gamma = 1`` nothing is evaluated."""
        if options.get("gamma") == 1:
            return replace(VRGD.traits, extra_evaluations=0, needs_groups=False)
        return replace(VRGD.traits, state=1 if options.get("momentum") else 0)

    def __init__(self, groups: int = 8, gamma: float = 0.1, momentum: float = 0.0) -> None:
        at_least(2, groups=groups)
        between(0.0, 1.0, closed="both", gamma=gamma)
        between(0.0, 1.0, momentum=momentum)
        self.groups = groups
        self.gamma = gamma
        self.momentum = momentum
        self._t = 0
        self._p: list[Tensor] = []
        self._share: Tensor | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        if self.gamma == 1:
            return
        x = closure.params
        refuse_complex("vrgd", x)
        for p in x:
            if p.grad is not None and p.grad.is_sparse:
                refuse_sparse("vrgd", p.grad)
        r = self._averaged(signal_to_noise(closure.groups(self.groups), self.gamma))
        moving = [(p.grad, r_p) for p, r_p in zip(x, r, strict=True) if p.grad is not None]
        if moving:
            g, r = map(list, zip(*moving, strict=True))
            torch._foreach_mul_(g, r)
            self._share = global_norm(r, 1.0) / sum(r_p.numel() for r_p in r)

    def _averaged(self, r: list[Tensor]) -> list[Tensor]:
        """``p / (1 - b3^t)``, or r itself without a momentum."""
        if not self.momentum:
            return r
        if not self.is_repeated:
            self._move(r)
        return list(torch._foreach_div(self._p, 1 - self.momentum**self._t))

    def _move(self, r: list[Tensor]) -> None:
        self._t += 1
        # All of them at the first step; later those of a group that was added since.
        self._p += [torch.zeros_like(new) for new in r[len(self._p) :]]
        self._p = [p.to(new) for p, new in zip(self._p, r, strict=True)]  # a checkpoint's device is any
        torch._foreach_lerp_(self._p, r, 1 - self.momentum)

    def state_dict(self) -> dict[str, Any]:
        return {"t": self._t, "p": list(self._p)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._t = state["t"]
        self._p = [p.clone() for p in state["p"]]

    def logged(self) -> dict[str, float]:
        """The mean of r: how much of the gradient is left, were all of its entries alike."""
        return {} if self._share is None else {"mean_ratio": float(self._share)}
