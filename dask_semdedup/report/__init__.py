"""The report: pages and figures to look at before choosing eps."""

from __future__ import annotations

from dask_semdedup.report.page import REPORT, Documents, write_report

__all__ = ["REPORT", "Documents", "write_report"]
