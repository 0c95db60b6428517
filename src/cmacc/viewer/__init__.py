"""Results to look at: the report of a run, its negatives and the page of a scan, as one HTML file each."""

from cmacc.viewer.inspect import write_inspection
from cmacc.viewer.report import write_report
from cmacc.viewer.run_folder import ReportError
from cmacc.viewer.scan_page import render_scan_page, write_scan_page

__all__ = ["ReportError", "render_scan_page", "write_inspection", "write_report", "write_scan_page"]
