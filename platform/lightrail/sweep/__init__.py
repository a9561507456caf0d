"""``train -m``: many configurations, each carried out as a job of its own, with a ledger that outlives any process."""

from lightrail.sweep.method import Choices, Dimension, Goal, Interval, SweepMethod
from lightrail.sweep.running import run_sweep

__all__ = ["Choices", "Dimension", "Goal", "Interval", "SweepMethod", "run_sweep"]
