"""CVaR: training on the worst of the losses rather than on their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightrail.options import between, one_of, positive
from lightrail.step import Closure, Transform
from lightrail.traits import Traits
from lightrail_optimizers.replaced_gradient import raw_gradient

__all__ = ["CVaR", "spl_plus", "subgradient"]


def spl_plus(
    losses: Tensor, squared_norms: Tensor, alpha: Tensor, *, beta: float, step: float, threshold_step: float
) -> tuple[Tensor, Tensor]:
    """The prox-linear step of each sample by itself, in closed form, and the mean of these steps.

    For one sample with loss l and gradient g at (theta, alpha) it solves
    ``min  a + [l + <g, t - theta> - a]_+ / (1-beta) + ||t - theta||² / (2 step) + (a - alpha)² / (2 threshold_step)``:
    ``t = theta - step u g`` and ``a = alpha - threshold_step (1 - u)``, where
    ``u = (l - alpha + threshold_step) / (step ||g||² + threshold_step)``, kept within ``[0, 1 / (1-beta)]``.

    Args:
        losses: l, ``[N]``.
        squared_norms: ``||g||²``, ``[N]``.
        alpha: The threshold: a 0-d tensor.
        beta: In [0, 1).
        step: Step size of theta, >= 0.
        threshold_step: Step size of alpha, > 0.

    Returns:
        u, ``[N]``, and the next threshold.

    Example:
        >>> losses, squared_norms = torch.tensor([2.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
        >>> alpha = torch.tensor(1.0, dtype=torch.float64)
        >>> u, alpha = spl_plus(losses, squared_norms, alpha, beta=0.9, step=0.05, threshold_step=0.05)
        >>> [round(0.05 * v, 9) for v in u.tolist()], round(alpha.item(), 9)
        ([0.21], 1.16)
    """
    u = ((losses - alpha + threshold_step) / (step * squared_norms + threshold_step)).clamp(0.0, 1 / (1 - beta))
    return u, alpha - threshold_step * (1 - u.mean())


def subgradient(losses: Tensor, alpha: Tensor, *, beta: float, threshold_step: float) -> tuple[Tensor, Tensor]:
    """``w_i = 1[l_i >= alpha] / (1-beta)`` and ``alpha -= threshold_step (1 - mean w)``: a subgradient step in both.

    Returns:
        w, ``[N]``, and the next threshold.

    Example:
        >>> w, alpha = subgradient(torch.tensor([0.5, 2.0]), torch.tensor(1.0), beta=0.5, threshold_step=0.1)
        >>> w.tolist(), alpha.item()
        ([0.0, 2.0], 1.0)
    """
    w = (losses >= alpha).to(losses) / (1 - beta)
    return w, alpha - threshold_step * (1 - w.mean())


class CVaR(Transform):
    """Minimises the mean of the worst losses, a share 1 - beta of them, in place of the mean of all.

    ``min over theta and alpha of  alpha + E[(l - alpha)_+] / (1-beta)``; the best alpha is the beta-quantile of the
    losses. With ``spl_plus`` each sample takes the step that is best for its linear model, as in :func:`spl_plus`,
    and the gradient is the mean of ``u_i g_i``; with ``subgradient`` the samples at or above alpha count
    ``1 / (1-beta)`` and the others not at all.

    Args:
        beta: In [0, 1): 0.9 trains on the worst tenth. 0 is the mean loss once alpha is below all losses.
        method: ``spl_plus`` or ``subgradient``.
        step: lambda of ``spl_plus``, > 0; ``null``: the learning rate of the optimizer's first group at that step, so
            that SGD takes the published step. Another optimizer takes ``mean u_i g_i`` for its gradient.
        threshold_step: Step size of alpha, > 0, in units of loss.
        threshold: alpha at the start; ``null``: the beta-quantile of the first batch's losses.

    Raises:
        ConfigurationError: An option out of range.
        ClosureError: The task offers no ``sample_losses``.

    Guarantees:
        Losses, weights and threshold are those of the whole window and of all ranks.

    Cost:
        Counted as two evaluations. For ``spl_plus`` one of them is the gradient of every sample: N copies of the
        parameters, and the time of up to N backward passes. ``subgradient`` takes a forward pass and one evaluation.

    Guarantees:
        What transforms before it made of the gradient is kept as a difference, at the price of one evaluation more.

    Deviations:
        The paper takes one sample a step. For a batch ``spl_plus`` here takes the mean of the steps that its samples
        would take alone; the prox-linear step of the mean itself would couple them. theta and alpha may have
        different step sizes.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.tensor([0.0]))
        >>> transform = CVaR(beta=0.5, method="subgradient", threshold=1.0)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=0.1), [transform])
        >>> samples = lambda x: (w - x) ** 2 / 2
        >>> loss = optimizer.step(
        ...     Closure(lambda x: samples(x).mean(), [w], torch.tensor([1.0, 3.0]), sample_losses_fn=samples)
        ... )
        >>> round(w.item(), 4)  # the sample at 3 alone, twice, over a batch of two
        0.3

    Reference:
        Meng and Gower, 2023, "A Model-Based Method for Minimizing CVaR and Beyond", arXiv:2305.17498, section 3.
    """

    traits = Traits(
        rule="g = mean u_i g_i; u_i = clip((l_i - alpha + s) / (lambda ||g_i||² + s), 0, 1 / (1-beta))",
        paper="Meng, Gower, 2023, A Model-Based Method for Minimizing CVaR and Beyond, arXiv:2305.17498",
        state=0,
        extra_evaluations=2,
        needs_sample_losses=True,
        example={"beta": 0.8},
    )

    def __init__(
        self,
        beta: float = 0.9,
        method: str = "spl_plus",
        step: float | None = None,
        threshold_step: float = 0.05,
        threshold: float | None = None,
    ) -> None:
        between(0.0, 1.0, beta=beta)
        one_of(("spl_plus", "subgradient"), method=method)
        positive(threshold_step=threshold_step)
        if step is not None:
            positive(step=step)
        self.beta = beta
        self.method = method
        self.step = step
        self.threshold_step = threshold_step
        self._groups: Sequence[Mapping[str, Any]] = ()
        self._alpha = None if threshold is None else torch.tensor(float(threshold), dtype=torch.float64)
        self._tail: Tensor | None = None
        self._cvar: Tensor | None = None

    def prepare(self, optimizer: Optimizer) -> None:
        self._groups = optimizer.param_groups

    def before_step(self, params: list[Tensor], closure: Closure) -> None:
        plain = raw_gradient(closure)
        own = closure.sample_losses()
        losses, first = of_all_ranks(own.detach().to(torch.promote_types(own.dtype, torch.float32)))
        if self._alpha is None:
            self._alpha = torch.quantile(losses, self.beta)
        alpha = self._alpha.to(losses)
        excess = (losses - alpha).clamp(min=0.0).mean() / (1 - self.beta)
        self._cvar, self._tail = alpha + excess, (losses >= alpha).to(losses).mean()
        if self.method == "spl_plus":
            jacobian = closure.sample_jacobian()
            u, moved = spl_plus(
                losses,
                _squared_norms(jacobian),
                alpha,
                beta=self.beta,
                step=self._step_now(),
                threshold_step=self.threshold_step,
            )
            gradient = [_mean_of_rows(u, rows) for rows in jacobian]
        else:
            w, moved = subgradient(losses, alpha, beta=self.beta, threshold_step=self.threshold_step)
            gradient = closure.weighted(w[first : first + len(own)])
        if not self.is_repeated:
            self._alpha = moved
        for k, (p, g) in enumerate(zip(closure.params, gradient, strict=True)):
            if p.grad is not None:
                p.grad = g if plain is None else g + (p.grad - plain[k]).to(g)

    def _step_now(self) -> float:
        if self.step is not None:
            return self.step
        return float(self._groups[0]["lr"]) if self._groups else self.threshold_step

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self._alpha}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._alpha = state["threshold"]

    def logged(self) -> dict[str, float]:
        if self._alpha is None or self._tail is None or self._cvar is None:
            return {}
        return {"threshold": float(self._alpha), "tail_fraction": float(self._tail), "cvar": float(self._cvar)}


def _squared_norms(jacobian: Sequence[Tensor]) -> Tensor:
    """``||g_i||²`` of every sample over all parameters, ``[N]``, in single precision at least."""
    total = []
    for rows in jacobian:
        flat = rows.reshape(len(rows), rows[0].numel())
        total.append(torch.linalg.vector_norm(flat, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)) ** 2)
    return torch.stack([each.to(total[0]) for each in total]).sum(0)


def _mean_of_rows(u: Tensor, rows: Tensor) -> Tensor:
    """``mean u_i g_i`` for one parameter."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (torch.tensordot(u.to(wide), wide, dims=1) / len(u)).to(rows.dtype)


def of_all_ranks(values: Tensor) -> tuple[Tensor, int]:
    """The values ``[N]`` of all ranks, in the order of the ranks, and where this rank's begin."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values, 0
    sizes = [torch.zeros((), dtype=torch.int64, device=values.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor(len(values), device=values.device))
    counts = [int(size) for size in sizes]
    padded = torch.cat([values, values.new_zeros(max(counts) - len(values))])
    found = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(found, padded)
    first = sum(counts[: distributed.get_rank()])
    return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)]), first
