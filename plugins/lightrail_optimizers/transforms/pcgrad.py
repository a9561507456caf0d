"""PCGrad: gradient surgery, from torchjd."""

from __future__ import annotations

from torch import Tensor

from lightrail.options import one_of
from lightrail.traits import Traits
from lightrail_optimizers.jacobian_descent import JacobianDescent
from lightrail_optimizers.library_optimizer import missing_library

try:
    from torchjd.aggregation import PCGradWeighting
except ModuleNotFoundError as error:
    raise missing_library("transform 'pcgrad'", error, "objectives") from error

__all__ = ["PCGrad"]


class PCGrad(JacobianDescent):
    """Gradient surgery: each objective's gradient loses the part that points against another's.

    For every i, ``p_i = g_i``; then for each other j, in random order, ``p_i -= (p_i · g_j) / ||g_j||² g_j`` where
    ``p_i · g_j < 0``; ``d = Σ_i p_i``. Needs the extra ``objectives``.

    Args:
        reduction: ``sum``, as published, or ``mean``, where the loss is the mean of the objectives and its learning
            rate is to be kept.

    Raises:
        ConfigurationError: A word that is not one of these.
        PluginError: The extra ``objectives`` is not installed.
        CompositionError: The task has no ``objectives``.

    Guarantees:
        Without conflict d is the sum of the gradients. With two objectives d conflicts with neither; with more it may,
        unlike ``upgrad``. Orders are drawn from torch's global generator; the first rank's count on all of them.

        What a transform earlier in the chain did to the loss's gradient g is kept as a difference:
        ``.grad = d + (g_edited - g)``, at the price of one more evaluation. Clipping and masks belong after this one.

    Example:
        >>> import torch
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [PCGrad()])
        >>> loss = optimizer.step(Closure(lambda: (J @ w).sum(), [w], objectives_fn=lambda: J @ w))
        >>> (-w).tolist()
        [0.5, 1.5]

    Reference:
        Yu, Kumar, Gupta, Levine, Hausman and Finn, 2020, "Gradient Surgery for Multi-Task Learning",
        arXiv:2001.06782, Algorithm 1. The weights are those of the library torchjd.
    """

    traits = Traits(
        rule="g = Σ_i p_i; p_i = g_i less its part against g_j, for each j in random order",
        paper=(
            "Yu, Kumar, Gupta, Levine, Hausman, Finn, 2020, Gradient Surgery for Multi-Task Learning, arXiv:2001.06782"
        ),
        state=0,
        extra_evaluations=1,
        needs_objectives=True,
        needs_whole_tensors=True,
        is_stochastic=True,
    )

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        one_of(("sum", "mean"), reduction=reduction)
        self.reduction = reduction
        self._weighting = PCGradWeighting()

    def weights(self, g: Tensor) -> Tensor:
        w = self._weighting(g)
        return w / len(g) if self.reduction == "mean" else w
