"""The step: the closure that methods ask, gradient transforms, and the loops that drive them under Lightning."""

from lightrail.step.batching import Batching, Extent, Portion
from lightrail.step.closure import Closure
from lightrail.step.transform import CombinedOptimizer, Transform, TransformedOptimizer

__all__ = ["Batching", "Closure", "CombinedOptimizer", "Extent", "Portion", "Transform", "TransformedOptimizer"]
