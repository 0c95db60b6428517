"""The HTML page of a scan: properties of the files, findings, and skipped files."""

from collections import Counter
from pathlib import Path

from cmacc.clips import FINDINGS, ScanResult
from cmacc.clips.catalog.listing import other_files
from cmacc.viewer.figures import histogram_panel
from cmacc.viewer.page import Figure, check_out, counted, duration, render, write_page

# Limits that keep the page small enough for a phone; the rest is only counted.
_MOST_THUMBNAILS, _MOST_ROWS, _MOST_MISSING = 200, 500, 100


def write_scan_page(result: ScanResult, out: Path, *, overwrite: bool = False) -> Path:
    """Write the page of a scan. The output is deterministic.

    Parameters
    ----------
    result
        Result of `scan`.
    out
        Path of the page.
    overwrite
        Whether an existing file may be replaced.

    Raises
    ------
    ReportError
        ``out`` is a folder, or already exists.
    """
    check_out("scan", out, overwrite)
    return write_page(out, render_scan_page(result))


def render_scan_page(result: ScanResult) -> str:
    """Render the page as a string."""
    records = list(result.manifest.records)
    return render(
        "scan.html.j2",
        name=", ".join(Path(root).name for root in sorted({str(file.root) for file in result.listing.files})),
        result=result,
        whole_count=sum(record.has_audio and record.has_picture for record in records),
        headlines=_tiles(result),
        findings=_findings(result),
        histograms=_histograms(result),
        skipped=_skipped(result)[:_MOST_THUMBNAILS],
        other_files=other_files(result.listing.other_endings),
        most_rows=_MOST_ROWS,
        most_missing=_MOST_MISSING,
    )


def _tiles(result: ScanResult) -> list[tuple[str, str, str]]:
    seconds = float(sum(result.manifest.column("duration_seconds")))
    bytes_ = sum(examination.size_bytes for examination in result.examinations.values())
    shown = [
        (f"{len(result.manifest):,}", "samples", counted(len(result.manifest.classes()), "class", "classes")),
        (duration(seconds), "of video and audio", f"{bytes_ / 1e9:,.2f} GB including skipped files"),
        (f"{len(result.skipped):,}", "files skipped", "see below for the reasons"),
    ]
    if result.listing.listed_count:
        missing = len(result.listing.missing)
        shown.append((f"{missing:,}", "missing", f"of {result.listing.listed_count:,} in the list"))
    return shown


def _findings(result: ScanResult) -> list[tuple[str, int, str, list[tuple[Path, str]]]]:
    """For every kind of finding: name, number of files, meaning, and list of (file, detail)."""
    root_of = {file.path: file.root for file in result.listing.files}
    counts = Counter(name for e in result.examinations.values() for name in {f.name for f in e.findings})
    details: dict[str, list[tuple[Path, str]]] = {name: [] for name in FINDINGS}
    for path, examination in result.examinations.items():
        for finding in examination.findings:
            within = finding.detail.replace(f"{root_of[path]}/", "")
            details[finding.name].append((path.relative_to(root_of[path]), within))
    return [(name, counts[name], meaning, details[name]) for name, meaning in FINDINGS.items() if counts[name]]


def _histograms(result: ScanResult) -> list[Figure]:
    examined = list(result.examinations.values())
    infos = [e.info for e in examined if e.info is not None]
    figures = []
    for title, values, label in (
        ("Length", [info.duration_seconds for info in infos], "seconds"),
        ("Frame rate", [info.fps for info in infos if info.width], "frames per second"),
        ("Size", [float(min(info.height, info.width)) for info in infos if info.width], "shorter side, pixels"),
        ("Loudness", [e.loudness_dbfs for e in examined if e.loudness_dbfs is not None], "dB of full scale"),
    ):
        if ordered := sorted(values):
            median = ordered[len(ordered) // 2]
            caption = f"{ordered[0]:.4g} to {ordered[-1]:.4g}, median {median:.4g}; {len(ordered):,} files"
            svg = histogram_panel(ordered, label, logarithmic=title == "Length")
            figures.append(Figure(title, svg, caption))
    return figures


def _skipped(result: ScanResult) -> list[tuple[Path, str, str]]:
    """File, reason and thumbnail (base64 JPEG, or empty) of every skipped file."""
    root_of = {file.path: file.root for file in result.listing.files}
    return [
        (
            path.relative_to(root_of[path]) if path in root_of else path,
            reason,
            (result.examinations[path].thumbnail if path in result.examinations else None) or "",
        )
        for path, reason in result.skipped.items()
    ]
