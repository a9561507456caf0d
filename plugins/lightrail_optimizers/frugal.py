"""FRUGAL: a method with state on a part of the hidden matrices, sign descent or SGD without state on the rest."""

from lightrail_optimizers.frugal_adamw import FrugalAdamW
from lightrail_optimizers.frugal_lion import FrugalLion
from lightrail_optimizers.frugal_sgd import FrugalSGD

__all__ = ["FrugalAdamW", "FrugalLion", "FrugalSGD"]
