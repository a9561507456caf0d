"""Where a run is carried out: orders that are written once, launches that start them, jobs that outlive a terminal."""

from lightrail.launch.job import Job, JobState, jobs_under
from lightrail.launch.launch import Launch
from lightrail.launch.order import Order, read_order, write_order

__all__ = ["Job", "JobState", "Launch", "Order", "jobs_under", "read_order", "write_order"]
