"""UPGrad: the mean of the objectives' gradients, after each gave up what would harm another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrail.errors import ConfigurationError
from lightrail.options import at_least, non_negative
from lightrail.step import Closure
from lightrail.traits import Traits
from lightrail_optimizers.dual_cone import projected_rows
from lightrail_optimizers.jacobian_descent import JacobianDescent, ObjectiveRows, Rows, SampleRows

__all__ = ["IWRM", "UPGrad"]


class UPGrad(JacobianDescent):
    """Descends all objectives of the task at once: no step is, to first order, against any of them.

    With rows g_i of J, each is projected onto the directions in which no objective gets worse, and the projections are
    averaged: ``d = Jᵀ Σ_i w_i``, ``w_i = argmin wᵀ J Jᵀ w`` over ``w >= u_i e_i``. The update follows d; the loss that
    ``training_step`` returns is logged, and its gradient is not used.

    Args:
        preference: u, one number an objective, each >= 0; ``None`` for ``1 / m`` each. They are not normalised: their
            sum scales the step. An objective with 0 is not pursued, only protected.

    Raises:
        ConfigurationError: A number out of range, or not as many of them as the task has objectives.
        CompositionError: The task has no ``objectives``.

    Guarantees:
        ``J d >= 0`` to rounding. Without conflict d is ``Jᵀ u``. Scaling one objective scales its own part of d alone.

        What a transform earlier in the chain did to the loss's gradient g is kept as a difference:
        ``.grad = d + (g_edited - g)``, at the price of one more evaluation, and then the first two hold for d alone.
        Clipping and masks belong after this one.

    Deviations:
        The published code regularises ``J Jᵀ`` by 1e-4 of its trace, and takes the plain mean where the trace is below
        1e-4; here the projection is exact for gradients of any size.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        >>> J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [UPGrad()])
        >>> loss = optimizer.step(Closure(lambda: (J @ w).mean(), [w], objectives_fn=lambda: J @ w))
        >>> [round(value, 7) for value in (-w).tolist()]
        [0.2923977, 1.9005848, 1.9005848]

    Reference:
        Quinton and Rey, 2024, "Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232, the aggregator
        UPGrad.
    """

    traits = Traits(
        rule="g = Jᵀ Σ_i w_i; w_i = argmin wᵀ J Jᵀ w over w >= u_i e_i",
        paper="Quinton, Rey, 2024, Jacobian Descent for Multi-Objective Optimization, arXiv:2406.16232",
        state=0,
        extra_evaluations=1,
        needs_objectives=True,
        needs_whole_tensors=True,
    )

    def __init__(self, preference: Sequence[float] | None = None) -> None:
        super().__init__()
        if preference is not None:
            preference = list(preference)
            for each in preference:
                non_negative(preference=each)
            if not any(preference):
                raise ConfigurationError(
                    "preference pursues no objective",
                    found=f"preference={preference}",
                    allowed="at least one number greater than 0",
                    remedy="Leave preference out to pursue all objectives alike.",
                )
        self.preference = preference

    def weights(self, g: Tensor) -> Tensor:
        count = len(g)
        if self.preference is None:
            return projected_rows(g, g.new_full((count,), 1 / count))
        if len(self.preference) != count:
            raise ConfigurationError(
                f"preference has {len(self.preference)} numbers, and the task has {count} objectives",
                found=f"preference={self.preference}",
                allowed=f"{count} numbers, in the order of the task's objectives",
                remedy="Write one number an objective, or leave preference out.",
            )
        return projected_rows(g, torch.tensor(self.preference, dtype=g.dtype))


class IWRM(JacobianDescent):
    """Instance-wise risk minimization: every sample of the batch is an objective of its own, combined by UPGrad.

    With rows g_i of J, the gradients of the N samples' losses: ``d = Jᵀ Σ_i w_i``, ``w_i = argmin wᵀ J Jᵀ w`` over
    ``w >= e_i / N``.

    Args:
        groups: ``None`` for single samples, which takes N copies of the parameters in memory, N² products of two of
            them, and N small problems of size N on the CPU (a quarter of a second for 256). A number >= 2 takes the
            gradients of so many parts of the batch instead: the cost of one evaluation, and that many copies.

    Raises:
        ConfigurationError: ``groups`` is below 2.
        CompositionError: The task has no ``sample_losses``, where ``groups`` is ``None``.
        ClosureError: A micro-batch has fewer samples than ``groups``.

    Guarantees:
        ``J d >= 0`` to rounding: to first order no sample's loss grows. Without conflict, d is the gradient of the
        mean. What a transform earlier in the chain did to the gradient is kept as for ``upgrad``.

    Deviations:
        All ranks' samples are objectives together; under distributed data parallelism every rank keeps the rows of
        all. The published code never forms J, for models of plain layers; here any model works, at that memory.
        ``groups`` is no part of the paper.

    Example:
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        >>> samples = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
        >>> closure = Closure(lambda x: (x @ w).mean(), [w], samples, sample_losses_fn=lambda x: x @ w)
        >>> loss = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [IWRM()]).step(closure)
        >>> [round(value, 7) for value in (-w).tolist()]
        [0.2923977, 1.9005848, 1.9005848]

    Reference:
        Quinton and Rey, 2024, "Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232, instance-wise
        risk minimization.
    """

    traits = Traits(
        rule="UPGrad over the gradients of single samples",
        paper="Quinton, Rey, 2024, Jacobian Descent for Multi-Objective Optimization, arXiv:2406.16232",
        state=0,
        extra_evaluations=1,
        needs_sample_losses=True,
        needs_whole_tensors=True,
    )

    def __init__(self, groups: int | None = None) -> None:
        super().__init__()
        if groups is not None:
            at_least(2, groups=groups)
        self.groups = groups

    @staticmethod
    def traits_under(options: Mapping[str, Any]) -> Traits:
        if options.get("groups") is None:
            return IWRM.traits
        return dataclasses.replace(IWRM.traits, needs_sample_losses=False, needs_groups=True)

    def rows(self, closure: Closure) -> Rows:
        if self.groups is None:
            return SampleRows(closure.sample_jacobian())
        return ObjectiveRows(closure.groups(self.groups))

    def weights(self, g: Tensor) -> Tensor:
        return projected_rows(g, g.new_full((len(g),), 1 / len(g)))
