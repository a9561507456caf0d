"""The equations of Sophia, in the paper's letters, over lists of tensors.

Liu, Li, Hall, Liang and Ma, 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv:2305.14342.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightrail.step.sharded import is_shard, shard_of
from lightrail_optimizers.tensor_lists import add_scaled_, shrink_

__all__ = ["draw_directions", "gauss_newton_bartlett", "hutchinson", "sophia"]


def sophia(
    x: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    h: list[Tensor],
    *,
    lr: float | Tensor,
    b1: float,
    gamma: float,
    eps: float,
    wd: float,
    form: str = "paper",
) -> None:
    """One update, in place: ``m = b1 m + (1-b1) g``; ``x *= 1 - lr wd``; ``x -= lr clip(m / max(gamma h, eps), 1)``.

    Args:
        x: Parameters.
        g: Gradients.
        m: Momenta.
        h: Estimates of the Hessian's diagonal.
        form: ``official`` divides by ``gamma h + eps`` in place of ``max(gamma h, eps)``.
    """
    shrink_(x, lr * wd)
    torch._foreach_lerp_(m, g, 1 - b1)
    curvature = torch._foreach_mul(h, gamma)
    if form == "paper":
        torch._foreach_clamp_min_(curvature, eps)
    else:
        torch._foreach_add_(curvature, eps)
    u = list(torch._foreach_div(m, curvature))
    torch._foreach_clamp_max_(u, 1.0)
    torch._foreach_clamp_min_(u, -1.0)
    add_scaled_(x, u, -lr)


def gauss_newton_bartlett(g: Sequence[Tensor], num_samples: int) -> list[Tensor]:
    """``B g ⊙ g``, where g is the gradient of the mean loss of B samples whose labels the model itself drew."""
    return list(torch._foreach_mul(torch._foreach_mul(list(g), list(g)), float(num_samples)))


def hutchinson(u: Sequence[Tensor], hessian_u: Sequence[Tensor]) -> list[Tensor]:
    """``u ⊙ (H u)``: its mean over u is the diagonal of H; exact for one u of signs where H is diagonal."""
    return list(torch._foreach_mul(list(u), list(hessian_u)))


def draw_directions(like: Sequence[Tensor], distribution: str) -> list[Tensor]:
    """One random direction, a tensor a parameter, the same on every rank.

    Args:
        like: What they resemble in shape, dtype and device.
        distribution: ``gaussian`` (mean 0, variance 1) or ``rademacher`` (-1 or 1, each with probability a half).

    Returns:
        New tensors, drawn from one number of torch's global generator.
    """
    seed = torch.randint(2**62, (1,), dtype=torch.int64)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # Ranks that drew different directions would average products of different ones, and drift apart.
        seed = seed.to(like[0].device)
        distributed.broadcast(seed, src=0)
    generators: dict[torch.device, torch.Generator] = {}
    directions = []
    for p in like:
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(int(seed))
        # Whole on every rank, so that ranks that hold parts draw what one would.
        form = {"dtype": p.dtype, "device": p.device}
        u = torch.empty(p.shape, **form) if is_shard(p) else torch.empty_like(p, requires_grad=False)
        if distribution == "gaussian":
            u.normal_(generator=generators[p.device])
        else:
            u.bernoulli_(0.5, generator=generators[p.device]).mul_(2).sub_(1)
        directions.append(shard_of(u, p))
    return directions
