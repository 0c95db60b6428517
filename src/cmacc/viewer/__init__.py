"""HTML pages of results: runs, their negatives, scans, duplicates, ablations. Each page is one self-contained file."""

from cmacc.viewer.ablation_page import render_ablation_page, write_ablation_page
from cmacc.viewer.dedupe_page import render_dedupe_page, write_dedupe_page
from cmacc.viewer.inspect import write_inspection
from cmacc.viewer.page import ReportError
from cmacc.viewer.report import write_report
from cmacc.viewer.scan_page import render_scan_page, write_scan_page

__all__ = [
    "ReportError",
    "render_ablation_page",
    "render_dedupe_page",
    "render_scan_page",
    "write_ablation_page",
    "write_dedupe_page",
    "write_inspection",
    "write_report",
    "write_scan_page",
]
