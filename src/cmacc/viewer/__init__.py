"""Results to look at: the report of a run, as one HTML page."""

from cmacc.viewer.report import write_report
from cmacc.viewer.run_folder import ReportError

__all__ = ["ReportError", "write_report"]
