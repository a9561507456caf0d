"""PSPS: the Polyak step size in the norm of a diagonal preconditioner, and its two kinds with slack."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lightrail.options import positive
from lightrail_optimizers.psps_base import TRAITS, PolyakStep, PolyakStepWithSlack
from lightrail_optimizers.psps_rule import polyak, polyak_l1, polyak_l2

__all__ = ["PSPS", "PSPSL1", "PSPSL2"]


class PSPS(PolyakStep):
    """PSPS: takes the step at which the linear model of the loss meets its lower bound, in a preconditioned norm.

    ``x -= min((f - f*) / ||g||²_B⁻¹, eta_max) B⁻¹ g`` with ``||g||²_B⁻¹ = gᵀ B⁻¹ g`` over all parameters.

    Args:
        params: Parameters or parameter groups. One step size serves all; the first group's ``f_star`` and ``eta_max``
            count.
        preconditioner: B. ``adam``: ``sqrt(v / (1-b2^t)) + eps``, v the average of g²; ``adagrad``:
            ``sqrt(sum of g²) + eps``; ``hutchinson``: ``max(|D|, alpha)``, D the average of z⊙Hz, z of random signs;
            ``none``: 1.
        f_star: A lower bound of the loss of one batch. It is more than 0 with label smoothing or with a penalty on the
            weights in the loss; a bound too low makes steps too long near the optimum.
        eta_max: The largest step size, > 0, in units of B⁻¹ g: of a signed gradient under ``adam``, of Newton's step
            under ``hutchinson``. ``None`` sets no bound, which is for models that can fit every batch.
        beta2: b2 of ``adam`` and of ``hutchinson``, in [0, 1).
        eps: Of ``adam`` and ``adagrad``, > 0.
        alpha: The least curvature under ``hutchinson``, > 0.
        warm_up: Under ``hutchinson`` the draws of which the first D is the mean, >= 1; each costs an evaluation, once.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: There is no closure, or under ``hutchinson`` none that is a :class:`lightrail.Closure`.

    Deviations:
        ``eta_max`` is from SPS_max (Loizou et al., 2021, arXiv:2002.10542): without it the step has no bound
        where the gradient vanishes above f*. A loss below ``f_star`` moves nothing.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = PSPS([x], preconditioner="none")
        >>> loss = optimizer.step(Closure(lambda: 2 + 3 * x[0] + 4 * x[1], [x]))
        >>> [round(v, 4) for v in x.tolist()]  # the linear model is 0 there
        [-0.24, -0.32]

    Reference:
        Abdukhakimov et al., 2023, arXiv:2310.02093.
    """

    traits = dataclasses.replace(TRAITS, rule="x -= min((f - f*) / gᵀB⁻¹g, eta_max) B⁻¹g, B a diagonal preconditioner")

    def __init__(
        self,
        params: Any,
        preconditioner: str = "adam",
        f_star: float = 0.0,
        eta_max: float | None = 1.0,
        beta2: float = 0.999,
        eps: float = 1e-8,
        alpha: float = 1e-2,
        warm_up: int = 100,
    ) -> None:
        if eta_max is not None:
            positive(eta_max=eta_max)
        super().__init__(
            params,
            {
                "preconditioner": preconditioner,
                "f_star": f_star,
                "eta_max": eta_max,
                "beta2": beta2,
                "eps": eps,
                "alpha": alpha,
                "warm_up": warm_up,
            },
        )

    def _length(self, f: float, n: float, kept: dict[str, Any]) -> float:
        return polyak(f, n, eta_max=math.inf if kept["eta_max"] is None else kept["eta_max"])


class PSPSL1(PolyakStepWithSlack):
    """PSPSL1: PSPS with a slack, priced in proportion, that remembers the losses of other batches.

    Each step solves ``min ½||Δ||²_B + mu/2 (s' - s)² + lam s'`` subject to ``f - f* + gᵀΔ <= s'`` and ``s' >= 0``, and
    moves by ``Δ = -min((f - f* - s + lam/mu)₊ / (||g||²_B⁻¹ + 1/mu), (f - f*) / ||g||²_B⁻¹) B⁻¹ g``. The slack s begins
    at 0 and takes the place of ``eta_max``: while batches keep a loss that no step removes, it rises to it.

    Args:
        params: Parameters or parameter groups. The first group's ``f_star``, ``lam`` and ``mu`` count.
        lam: λ, the price of slack, >= 0, and the step size (in B⁻¹ g) on a loss that stays as it is; the larger,
            the nearer to PSPS.
        mu: µ, its inertia, > 0; no step is longer than µ times the loss plus λ.
        preconditioner: As for :class:`PSPS`, and so are ``f_star``, ``beta2``, ``eps``, ``alpha`` and ``warm_up``.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: There is no closure, or under ``hutchinson`` none that is a :class:`lightrail.Closure`.

    Deviations:
        The formula is derived from the problem above, of which the slack methods of Gower et al., 2022,
        arXiv:2202.12328, are the case ``B = I``, with ``lam/mu`` for their λ/(2(1-λ)).

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = PSPSL1([x], lam=0.5, mu=1.0, preconditioner="none")
        >>> loss = optimizer.step(Closure(lambda: 2 + 0.3 * x[0] + 0.4 * x[1], [x]))
        >>> [round(v, 4) for v in x.tolist()], optimizer.logged()
        ([-0.6, -0.8], {'step_size': 2.0, 'slack': 1.5})

    Reference:
        Abdukhakimov et al., 2023, arXiv:2310.02093.
    """

    traits = dataclasses.replace(TRAITS, rule="x -= tau B⁻¹g with f - tau gᵀB⁻¹g <= s, at a price of lam s")

    def _solve(self, f: float, n: float, s: float, *, lam: float, mu: float) -> tuple[float, float]:
        return polyak_l1(f, n, s, lam=lam, mu=mu)


class PSPSL2(PolyakStepWithSlack):
    """PSPSL2: PSPS with a slack, priced by its square, that remembers the losses of other batches.

    Each step solves ``min ½||Δ||²_B + mu/2 (s' - s)² + lam/2 s'²`` subject to ``f - f* + gᵀΔ <= s'``, and moves by
    ``Δ = -(f - f* - mu s / (mu + lam))₊ / (||g||²_B⁻¹ + 1 / (mu + lam)) B⁻¹ g``; then
    ``s = (mu s + tau) / (mu + lam)``. The slack s begins at 0.

    Args:
        params: Parameters or parameter groups. The first group's ``f_star``, ``lam`` and ``mu`` count.
        lam: λ, the price of slack, >= 0; on a loss that stays as it is, the step size (in B⁻¹ g) is at most λ times it.
        mu: µ, its inertia, > 0; no step is longer than (λ + µ) times the loss.
        preconditioner: As for :class:`PSPS`, and so are ``f_star``, ``beta2``, ``eps``, ``alpha`` and ``warm_up``.

    Raises:
        ConfigurationError: An option out of range; a complex parameter or a sparse gradient.
        ClosureError: There is no closure, or under ``hutchinson`` none that is a :class:`lightrail.Closure`.

    Deviations:
        The formula is derived from the problem above, of which the slack methods of Gower et al., 2022,
        arXiv:2202.12328, are the case ``B = I``, ``mu = 1 - lam``.

    Example:
        >>> import torch
        >>> from lightrail import Closure
        >>> x = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = PSPSL2([x], lam=1.0, mu=1.0, preconditioner="none")
        >>> loss = optimizer.step(Closure(lambda: 2 + 3 * x[0] + 4 * x[1], [x]))
        >>> [round(v, 4) for v in x.tolist()]
        [-0.2353, -0.3137]

    Reference:
        Abdukhakimov et al., 2023, arXiv:2310.02093.
    """

    traits = dataclasses.replace(TRAITS, rule="x -= tau B⁻¹g with f - tau gᵀB⁻¹g <= s, at a price of lam s²/2")

    def _solve(self, f: float, n: float, s: float, *, lam: float, mu: float) -> tuple[float, float]:
        return polyak_l2(f, n, s, lam=lam, mu=mu)
