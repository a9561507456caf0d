"""perpGrad: the gradient without its part along the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.step import Closure, Transform
from lightrail.step.sharded import copy_tensors
from lightrail.traits import Claim, Traits
from lightrail_optimizers.dense_gradients import dense_gradients
from lightrail_optimizers.tensor_lists import refuse_complex

__all__ = ["PerpGrad", "perpendicular_"]

# A remainder below this many roundings of the gradient is round-off, not a direction.
_ROUNDINGS = 4.0


def perpendicular_(w: Sequence[Tensor], g: Sequence[Tensor], rescale: bool = True) -> Tensor:
    """``g -= (<w, g> / ||w||²) w`` for each tensor, in place, and back to the length of ``g`` where rescaled.

    Tensors of one element are left as they are. Where g is parallel to w but for round-off, it becomes zero.

    Args:
        w: Weights.
        g: Their gradients, dense and real.
        rescale: Whether each keeps its norm.

    Returns:
        The share of ``||g||²`` that lay along the weights, over all tensors of more than one element: a 0-d tensor;
        nothing waits for it.

    Example:
        >>> g = [torch.tensor([1.0, 0.0]).double()]
        >>> round(perpendicular_([torch.tensor([3.0, 4.0]).double()], g).item(), 6)
        0.36
        >>> [round(value, 6) for value in g[0].tolist()]
        [0.8, -0.6]
    """
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for w_i, g_i in zip(w, g, strict=True):
        if g_i.numel() > 1:
            weights, gradients = kinds.setdefault((g_i.device, g_i.dtype), ([], []))
            weights.append(w_i.detach())
            gradients.append(g_i)
    if not kinds:
        return torch.zeros(())
    squares = [_perpendicular_of_one_kind_(*lists, rescale) for lists in kinds.values()]
    along, whole = (torch.stack([each.to(squares[0][0]) for each in part]).sum() for part in zip(*squares, strict=True))
    return along / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _perpendicular_of_one_kind_(w: list[Tensor], g: list[Tensor], rescale: bool) -> tuple[Tensor, Tensor]:
    """The same for tensors of one device and dtype; returns the squared norms of what lay along w, and of g."""
    precision, wide = torch.finfo(g[0].dtype), torch.promote_types(g[0].dtype, torch.float32)
    w = [w_i.to(wide) for w_i in w]
    u = [g_i.to(wide) for g_i in g]
    # Sums of products, which torch adds up pairwise: its norms and dots lose four digits over ten million entries.
    inner = torch.stack([(w_i * u_i).sum() for w_i, u_i in zip(w, u, strict=True)])
    square = torch.stack([(w_i * w_i).sum() for w_i in w])
    coefficient = inner / square.clamp(min=torch.finfo(wide).tiny)
    norm = torch.stack(torch._foreach_norm(u))
    torch._foreach_addcmul_(u, w, list(coefficient.unbind()), value=-1)
    remainder = torch.stack(torch._foreach_norm(u))
    factor = norm / remainder if rescale else torch.ones_like(norm)
    factor = torch.where(remainder > _ROUNDINGS * precision.eps * norm, factor, 0.0)
    torch._foreach_mul_(u, list(factor.unbind()))
    if g[0].dtype != wide:
        copy_tensors(g, u)
    return (inner * coefficient).sum(), norm.square().sum()


class PerpGrad(Transform):
    """Takes from each tensor's gradient its part along the weights, which only scales the logits of a fitted model.

    ``g_perp = g - (<w, g> / ||w||²) w``, then ``g = g_perp ||g|| / ||g_perp||``; tensor by tensor.

    Meant for training without weight decay: scaling a network up is what lowers the loss once every sample is fitted,
    at no change of its answers, until the softmax runs out of digits.

    Args:
        rescale: Whether each gradient gets back the norm that it had; otherwise it is the plain projection.

    Raises:
        ConfigurationError: A parameter is complex, or a gradient is sparse.

    Guarantees:
        Weights of zero leave the gradient as it is. A gradient that is not finite stays so. Norms are taken in single
        precision at least, and nothing waits for them.

    Deviations:
        A tensor of one element is left alone: nothing is perpendicular to it, and the published code rescales the
        round-off that remains to the full gradient. For the same reason, a gradient whose remainder is no longer than
        four roundings of its dtype becomes zero. The published code adds 1e-30 to both denominators.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [PerpGrad()])
        >>> loss = optimizer.step(Closure(lambda: w[0], [w]))
        >>> [round(value, 4) for value in w.tolist()]
        [2.92, 4.06]

    Reference:
        Prieto, Barsbey, Mediano and Birdal, 2025, "Grokking at the Edge of Numerical Stability", arXiv:2501.04697,
        the section on perpGrad.
    """

    traits = Traits(
        rule="g -= (<w, g> / ||w||²) w, back to the length of g, tensor by tensor",
        paper="Prieto, Barsbey, Mediano, Birdal, 2025, Grokking at the Edge of Numerical Stability, arXiv:2501.04697",
        state=0,
        claim=Claim(
            sentence="test accuracy above 0.99 where the optimizer alone only memorises",
            problems=("modular_addition",),
        ),
        example={"rescale": True},
    )

    def __init__(self, rescale: bool = True) -> None:
        self.rescale = rescale
        self._share: Tensor | None = None

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        refuse_complex("perp_grad", params)
        self._share = perpendicular_(*dense_gradients("perp_grad", params), self.rescale)

    def logged(self) -> dict[str, float]:
        return {} if self._share is None else {"gradient_along_weights": float(self._share)}
