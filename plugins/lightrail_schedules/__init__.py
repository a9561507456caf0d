"""Learning-rate schedules.

Imported at once, not lazily: each function has the name of its module, and only so is it always the function.
"""

from lightrail_schedules.constant import constant
from lightrail_schedules.cosine import cosine
from lightrail_schedules.linear_decay import linear_decay
from lightrail_schedules.onecycle import onecycle
from lightrail_schedules.warmup_stable_decay import warmup_stable_decay

__all__ = ["constant", "cosine", "linear_decay", "onecycle", "warmup_stable_decay"]
