"""SGDP: SGD with momentum, without the part of its step that lengthens scale-invariant weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative, one_of, positive
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.scale_invariant import decay_, invariances, projected
from lightrail_optimizers.tensor_lists import add_scaled_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["SGDP", "sgdp"]


def sgdp(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    wd: float,
    delta: float,
    wd_ratio: float,
    eps: float,
    form: str = "paper",
) -> None:
    """One update, in place: ``m = momentum m + (1-dampening) g``; ``u = m``, projected where x is invariant;
    ``x *= 1 - lr wd r / (1-momentum)``; ``x -= lr u``.

    Args:
        x: Parameters.
        g: Gradients.
        m: Momenta.
        form: ``official`` projects the momentum itself.
    """
    found = invariances(x, g, delta=delta, eps=eps)
    torch._foreach_mul_(m, momentum)
    torch._foreach_add_(m, g, alpha=1 - dampening)
    u = list(torch._foreach_add(g, m, alpha=momentum)) if nesterov else m
    u = projected(u, x, found, eps=eps)
    if form == "official" and not nesterov:
        torch._foreach_copy_(m, u)
    if wd:
        decay_(x, found, lr * (wd / (1 - momentum)), wd_ratio)
    add_scaled_(x, u, -lr)


class SGDP(TensorwiseOptimizer):
    """SGDP: momentum SGD whose step leaves out its radial part on weights whose scale has no effect on the loss.

    ``m = momentum m + (1-dampening) g``; ``u = m``, or ``g + momentum m`` with ``nesterov``. Where a tensor is taken to
    be scale-invariant, by the test of :class:`AdamP`, ``u -= ŵ (ŵ·u)`` and r is ``wd_ratio``; r is 1 elsewhere.
    ``x *= 1 - lr wd r / (1-momentum)``; ``x -= lr u``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        momentum: In [0, 1).
        dampening: In [0, 1].
        nesterov: Whether the momentum looks ahead.
        weight_decay: Decoupled, >= 0; divided by ``1 - momentum``, so that it is as strong as torch's SGD has it.
        delta: The threshold, >= 0; with 0 and no weight decay it is SGD.
        wd_ratio: The part of the weight decay that is left to scale-invariant weights, in [0, 1].
        eps: Added to the norm of a weight, > 0.
        form: ``paper``, or ``official`` for the authors' code.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same to rounding, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Deviations:
        The authors' code, without ``nesterov``, projects the momentum itself rather than the step alone, so that
        later steps differ too; ``form=official`` does so. Its ``momentum`` is 0 by default, with which there is
        nothing to slow down.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> optimizer = SGDP([w], lr=0.1)
        >>> for row in ([4.0, -3.0], [4.0, -2.9]):
        ...     w.grad = torch.tensor([row, [1.0, 0.0]])
        ...     optimizer.step()
        >>> [[round(v, 3) for v in row] for row in w.tolist()]
        [[1.84, 4.86], [-0.29, 2.0]]

    Reference:
        Heo et al., 2021, arXiv:2006.08217, Algorithm 1.
    """

    traits = Traits(
        rule="x -= lr (momentum, without its part along w where g is at right angles to w, + wd r x)",
        paper="Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha, 2021, AdamP: Slowing Down the Slowdown for Momentum Optimizers on "
        "Scale-invariant Weights, arXiv:2006.08217",
        state=1,
        needs_whole_tensors=True,
        example={"lr": 0.01},
        claim=Claim(sentence="a lower loss than SGD's", baseline="sgd", baseline_options={"momentum": 0.9}),
        peers=(Peer("pytorch_optimizer.SGDP"), Peer("timm.optim.SGDP", {"lr": 0.1})),
    )
    state_names = ("momentum",)
    rule = staticmethod(sgdp)

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        eps: float = 1e-8,
        form: str = "paper",
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay, delta=delta)
        between(0.0, 1.0, momentum=momentum)
        between(0.0, 1.0, closed="both", dampening=dampening, wd_ratio=wd_ratio)
        positive(eps=eps)
        one_of(("paper", "official"), form=form)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "delta": delta,
                "wd_ratio": wd_ratio,
                "eps": eps,
                "form": form,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        names = ("lr", "momentum", "dampening", "nesterov", "delta", "wd_ratio", "eps", "form")
        return {"wd": group["weight_decay"], **{name: group[name] for name in names}}
