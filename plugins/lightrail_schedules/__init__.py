"""Learning-rate schedules.

Imported at once, not lazily: each function has the name of its module, and only so is it always the function.
"""

from lightrail_schedules.batch_scaling import batch_scaling
from lightrail_schedules.constant import constant
from lightrail_schedules.cosine import cosine
from lightrail_schedules.inverse_sqrt import inverse_sqrt
from lightrail_schedules.linear_decay import linear_decay
from lightrail_schedules.max_lr_probe import max_lr_probe
from lightrail_schedules.onecycle import onecycle
from lightrail_schedules.polynomial import polynomial
from lightrail_schedules.refined import refined
from lightrail_schedules.sgdr import sgdr
from lightrail_schedules.trapezoid import trapezoid
from lightrail_schedules.warmup_stable_decay import warmup_stable_decay

__all__ = [
    "batch_scaling",
    "constant",
    "cosine",
    "inverse_sqrt",
    "linear_decay",
    "max_lr_probe",
    "onecycle",
    "polynomial",
    "refined",
    "sgdr",
    "trapezoid",
    "warmup_stable_decay",
]
