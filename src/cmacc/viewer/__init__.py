"""Results to look at: pages on a run, its negatives, a scan and an ablation, as one HTML file each."""

from cmacc.viewer.ablation_page import render_ablation_page, write_ablation_page
from cmacc.viewer.inspect import write_inspection
from cmacc.viewer.page import ReportError
from cmacc.viewer.report import write_report
from cmacc.viewer.scan_page import render_scan_page, write_scan_page

__all__ = [
    "ReportError",
    "render_ablation_page",
    "render_scan_page",
    "write_ablation_page",
    "write_inspection",
    "write_report",
    "write_scan_page",
]
