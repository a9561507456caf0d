"""Online Subspace Descent: state in a low-rank subspace that online PCA keeps near the gradients."""

from lightrail_optimizers.osd_adamw import OSDAdamW
from lightrail_optimizers.osd_lion import OSDLion
from lightrail_optimizers.osd_sgd import OSDSGD

__all__ = ["OSDSGD", "OSDAdamW", "OSDLion"]
