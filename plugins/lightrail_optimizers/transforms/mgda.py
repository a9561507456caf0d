"""MGDA: the shortest convex combination of the objectives' gradients, from torchjd."""

from __future__ import annotations

from torch import Tensor

from lightrail.options import at_least, positive
from lightrail.traits import Traits
from lightrail_optimizers.jacobian_descent import JacobianDescent
from lightrail_optimizers.library_optimizer import missing_library

try:
    from torchjd.aggregation import MGDAWeighting
except ModuleNotFoundError as error:
    raise missing_library("transform 'mgda'", error, "objectives") from error

__all__ = ["MGDA"]


class MGDA(JacobianDescent):
    """Multiple-gradient descent: as much progress as possible for the objective that gains least.

    ``d = Jᵀ w``, ``w = argmin ||Jᵀ w||`` over ``w >= 0, Σ w_i = 1``: the shortest vector in the convex hull of the
    objectives' gradients, by Frank and Wolfe's method. Small gradients have large weights. Needs the extra
    ``objectives``.

    Args:
        epsilon: The iterations end once one moves w by less than this share, > 0.
        max_iterations: How many there are at most, >= 1.

    Raises:
        ConfigurationError: An option out of range.
        PluginError: The extra ``objectives`` is not installed.
        CompositionError: The task has no ``objectives``.

    Guarantees:
        ``g_i · d >= ||d||²`` for every objective, within the accuracy of the iterations; for two objectives it is
        exact. Where d vanishes, no direction is better for all.

        What a transform earlier in the chain did to the loss's gradient g is kept as a difference:
        ``.grad = d + (g_edited - g)``, at the price of one more evaluation. Clipping and masks belong after this one.

    Example:
        >>> import torch
        >>> from lightrail import Closure, TransformedOptimizer
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> optimizer = TransformedOptimizer(torch.optim.SGD([w], lr=1.0), [MGDA()])
        >>> loss = optimizer.step(Closure(lambda: (J @ w).mean(), [w], objectives_fn=lambda: J @ w))
        >>> [round(value, 4) for value in (-w).tolist()]
        [0.8, 0.4]

    Reference:
        Désidéri, 2012, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes Rendus
        Mathématique 350, doi:10.1016/j.crma.2012.03.014. The iterations: Sener and Koltun, 2018, "Multi-Task Learning
        as Multi-Objective Optimization", arXiv:1810.04650, Algorithm 2. The weights are those of the library torchjd.
    """

    traits = Traits(
        rule="g = Jᵀ w; w = argmin ||Jᵀ w|| over convex weights",
        paper=(
            "Désidéri, 2012, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, "
            "doi:10.1016/j.crma.2012.03.014"
        ),
        state=0,
        extra_evaluations=1,
        needs_objectives=True,
        needs_whole_tensors=True,
    )

    def __init__(self, epsilon: float = 0.001, max_iterations: int = 100) -> None:
        super().__init__()
        positive(epsilon=epsilon)
        at_least(1, max_iterations=max_iterations)
        self._weighting = MGDAWeighting(epsilon=epsilon, max_iters=max_iterations)

    def weights(self, g: Tensor) -> Tensor:
        return self._weighting(g)
