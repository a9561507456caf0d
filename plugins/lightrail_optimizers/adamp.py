"""AdamP: AdamW without the part of its step that lengthens scale-invariant weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrail.options import between, non_negative, positive
from lightrail.traits import Claim, Peer, Traits
from lightrail_optimizers.adam_rule import adam_direction, adam_moments_, adam_update, adamw_
from lightrail_optimizers.scale_invariant import decay_, invariances, projected
from lightrail_optimizers.tensor_lists import add_scaled_
from lightrail_optimizers.tensorwise import TensorwiseOptimizer

__all__ = ["AdamP", "adamp"]


def adamp(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    lr: float | Tensor,
    t: int | Tensor,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
) -> None:
    """One update, in place: u is Adam's update, projected where x is invariant; ``x *= 1 - lr wd r``; ``x += lr u``.

    r is ``wd_ratio`` where x is invariant, 1 elsewhere.
    """
    found = invariances(x, g, delta=delta, eps=eps)
    if not nesterov:
        plain = [index for index, each in enumerate(found) if each is None]
        if plain:
            adamw_(*_picked(plain, x, g, m, v), lr=lr, t=t, b1=b1, b2=b2, eps=eps, wd=wd)
        rest = [index for index, each in enumerate(found) if each is not None]
        x, g, m, v = _picked(rest, x, g, m, v)
        found = [found[index] for index in rest]
    if not x:
        return
    if nesterov:
        adam_moments_(g, m, v, b1=b1, b2=b2)
        u = adam_direction(list(torch._foreach_lerp(m, g, 1 - b1)), v, t=t, b1=b1, b2=b2, eps=eps)
        torch._foreach_neg_(u)
    else:
        u = adam_update(g, m, v, t=t, b1=b1, b2=b2, eps=eps)
    u = projected(u, x, found, eps=eps)
    if wd:
        decay_(x, found, lr * wd, wd_ratio)
    add_scaled_(x, u, lr)


def _picked(indices: list[int], *lists: list[Tensor]) -> list[list[Tensor]]:
    return [[tensors[index] for index in indices] for tensors in lists]


class AdamP(TensorwiseOptimizer):
    """AdamP: Adam whose step leaves out its radial part on weights whose scale has no effect on the loss.

    ``m = b1 m + (1-b1) g``; ``v = b2 v + (1-b2) g²``; ``u = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``. Where
    ``|cos(g, w)| < delta / sqrt(size of w)`` for each row w (an output channel) of a tensor of two dimensions or more,
    or else for the tensor as a whole, it is taken to be scale-invariant: ``u -= ŵ (ŵ·u)`` with ``ŵ = w / (|w| + eps)``,
    and r is ``wd_ratio``; r is 1 elsewhere. ``x *= 1 - lr wd r``; ``x -= lr u``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        betas: ``(b1, b2)``, each in [0, 1).
        eps: Added to the root of the second moment, and to the norm of a weight, > 0.
        weight_decay: Decoupled, >= 0.
        delta: The threshold, >= 0; with 0 it is AdamW.
        wd_ratio: The part of the weight decay that is left to scale-invariant weights, in [0, 1].
        nesterov: Whether the momentum looks ahead.
        maximize: Ascend.
        foreach: One call for many tensors; ``False`` is the same to rounding, tensor by tensor, with less memory.
        compile: Compile the update; a learning rate that moves does not compile it again.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.

    Guarantees:
        On an accelerator the test stays on the device: no step waits for it.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> w.grad = torch.tensor([[4.0, -3.0], [1.0, 0.0]])  # at right angles to each row
        >>> AdamP([w], lr=0.1).step()
        >>> [[round(v, 3) for v in row] for row in w.tolist()]
        [[2.888, 4.084], [-0.1, 2.0]]

    Reference:
        Heo et al., 2021, arXiv:2006.08217, Algorithm 2.
    """

    traits = Traits(
        rule="x -= lr (Adam's direction, without its part along w where g is at right angles to w, + wd r x)",
        paper="Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha, 2021, AdamP: Slowing Down the Slowdown for Momentum Optimizers on "
        "Scale-invariant Weights, arXiv:2006.08217",
        state=2,
        needs_whole_tensors=True,
        example={"lr": 0.01},
        claim=Claim(sentence="a lower loss than AdamW's"),
        peers=(Peer("pytorch_optimizer.AdamP"), Peer("timm.optim.AdamP")),
    )
    state_names = ("momentum", "second_moment")
    rule = staticmethod(adamp)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool = True,
        compile: bool = False,
    ) -> None:
        non_negative(lr=lr, weight_decay=weight_decay, delta=delta)
        b1, b2 = betas
        between(0.0, 1.0, beta1=b1, beta2=b2)
        between(0.0, 1.0, closed="both", wd_ratio=wd_ratio)
        positive(eps=eps)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": (b1, b2),
                "eps": eps,
                "weight_decay": weight_decay,
                "delta": delta,
                "wd_ratio": wd_ratio,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def scalars(self, group: dict[str, Any], t: int) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {
            "lr": group["lr"],
            "t": t,
            "b1": b1,
            "b2": b2,
            "eps": group["eps"],
            "wd": group["weight_decay"],
            "delta": group["delta"],
            "wd_ratio": group["wd_ratio"],
            "nesterov": group["nesterov"],
        }
