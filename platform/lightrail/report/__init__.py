"""What a run leaves for people to read: a page, and the table at its end."""

from __future__ import annotations

from lightrail.report.metrics import read_metrics
from lightrail.report.page import write_report
from lightrail.report.result import ResultTable, result_table

__all__ = ["ResultTable", "read_metrics", "result_table", "write_report"]
