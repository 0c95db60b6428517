"""The page of a scan: what the files are like, what is wrong with which, and which were skipped."""

from collections import Counter
from pathlib import Path

from cmacc.clips import FINDINGS, Examination, ScanResult
from cmacc.clips.storage import written_aside
from cmacc.viewer.figures import histogram_panel
from cmacc.viewer.page import duration, escape, figure, note, page, section, tiles

# A page must open on a phone: what comes beyond these is counted only.
_MOST_THUMBNAILS, _MOST_ROWS, _MOST_MISSING = 200, 500, 100


def write_scan_page(result: ScanResult, out: Path, *, overwrite: bool = False) -> Path:
    """Write the page of a scan. The same files give the same page, byte for byte.

    Parameters
    ----------
    result
        What `scan` gave.
    out
        The page.
    overwrite
        Whether a file that is there may be replaced.

    Raises
    ------
    FileExistsError
        ``out`` is there already.
    """
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: is there already; give --overwrite to replace it")
    with written_aside(out) as aside:
        aside.write_text(render_scan_page(result), encoding="utf-8")
    return out


def render_scan_page(result: ScanResult) -> str:
    """The page as text."""
    roots = sorted({str(file.root) for file in result.listing.files})
    body = [
        f'<header><p class="eyebrow">cmacc scan</p><h1>{escape(", ".join(Path(root).name for root in roots))}</h1>'
        f'<p class="lead">{_summary(result)}</p></header>',
        _tiles(result),
        _findings_section(result),
        _histograms_section(result),
        _refused_section(result),
        _list_section(result),
    ]
    return page("cmacc scan", "\n".join(part for part in body if part))


def _summary(result: ScanResult) -> str:
    records = list(result.manifest.records)
    both = sum(record.has_audio and record.has_picture for record in records)
    text = (
        f"{len(result.examinations):,} files were examined; {len(records):,} samples are in the manifest, {both:,} "
        f"of them with picture and sound, and {len(result.skipped):,} skipped. The data set's fingerprint "
        f"is {result.manifest.fingerprint()}."
    )
    return escape(text)


def _tiles(result: ScanResult) -> str:
    seconds = float(sum(result.manifest.column("duration_seconds")))
    bytes_ = sum(examination.size_bytes for examination in result.examinations.values())
    shown = [
        (f"{len(result.manifest):,}", "samples", f"{len(result.manifest.classes()):,} classes"),
        (duration(seconds), "of video and sound", f"{bytes_ / 1e9:,.2f} GB with the skipped files"),
        (f"{len(result.skipped):,}", "files skipped", "see below for the reasons"),
    ]
    if result.listing.listed_count:
        missing = len(result.listing.missing)
        shown.append((f"{missing:,}", "missing", f"of {result.listing.listed_count:,} in the list"))
    return tiles(shown)


def _findings_section(result: ScanResult) -> str:
    counts = Counter(name for e in result.examinations.values() for name in {f.name for f in e.findings})
    rows = "".join(
        f'<tr class="new"><th>{escape(name)}</th><td class="number">{counts[name]:,}</td>'
        f'<td class="number">{counts[name] / len(result.examinations):.1%}</td><td>{escape(meaning)}</td></tr>'
        for name, meaning in FINDINGS.items()
        if counts[name]
    )
    if not rows:
        return section("findings", "Findings", note("No issues found."))
    table = (
        '<div class="scroll"><table><thead><tr><th>finding</th><th class="number">files</th>'
        f'<th class="number">share</th><th>what it means</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    return section("findings", "Findings", table, _examples(result))


def _examples(result: ScanResult) -> str:
    """For every kind of finding, which files have it."""
    root_of = {file.path: file.root for file in result.listing.files}
    parts = []
    for name in FINDINGS:
        told = [
            (path, finding.detail)
            for path, examination in result.examinations.items()
            for finding in examination.findings
            if finding.name == name
        ]
        if not told:
            continue
        shown = "".join(
            f"<dt>{escape(path.relative_to(root_of[path]))}</dt><dd>{escape(_within(detail, root_of[path]))}</dd>"
            for path, detail in told[:_MOST_ROWS]
        )
        more = f"<p>and {len(told) - _MOST_ROWS:,} more</p>" if len(told) > _MOST_ROWS else ""
        parts.append(f"<details><summary>{escape(name)}: {len(told):,} files</summary><dl>{shown}</dl>{more}</details>")
    return "".join(parts)


def _within(detail: str, root: Path) -> str:
    return detail.replace(f"{root}/", "")


def _histograms_section(result: ScanResult) -> str:
    examined = list(result.examinations.values())
    infos = [e.info for e in examined if e.info is not None]
    short_sides = [float(min(info.height, info.width)) for info in infos if info.width]
    panels = [
        _histogram("Length", [info.duration_seconds for info in infos], "seconds", True),
        _histogram("Frame rate", [info.fps for info in infos if info.width], "frames per second", False),
        _histogram("Size", short_sides, "shorter side, pixels", False),
        _histogram("Loudness", _loudness(examined), "dB of full scale", False),
    ]
    shown = "".join(panel for panel in panels if panel)
    return section("histograms", "What the files are like", f'<div class="panels">{shown}</div>') if shown else ""


def _loudness(examined: list[Examination]) -> list[float]:
    return [e.loudness_dbfs for e in examined if e.loudness_dbfs is not None]


def _histogram(title: str, values: list[float], label: str, logarithmic: bool) -> str:
    if not values:
        return ""
    ordered = sorted(values)
    caption = f"{ordered[0]:.4g} to {ordered[-1]:.4g}, median {ordered[len(ordered) // 2]:.4g}; {len(values):,} files"
    return figure(title, histogram_panel(values, label, logarithmic=logarithmic), caption)


def _refused_section(result: ScanResult) -> str:
    if not result.skipped:
        return section("skipped", "Skipped", note("No file was skipped."))
    root_of = {file.path: file.root for file in result.listing.files}
    cards = []
    for path, reason in list(result.skipped.items())[:_MOST_THUMBNAILS]:
        examination = result.examinations.get(path)
        if examination is not None and examination.thumbnail is not None:
            shown = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{escape(examination.thumbnail)}">'
        else:
            shown = '<span class="gone">no picture</span>'
        name = path.relative_to(root_of[path]) if path in root_of else path
        cards.append(f"<li>{shown}<b>{escape(name)}</b><span>{escape(reason)}</span></li>")
    more = len(result.skipped) - _MOST_THUMBNAILS
    parts = [f'<ul class="answers">{"".join(cards)}</ul>', f"<p>and {more:,} more</p>" if more > 0 else ""]
    return section("skipped", f"Skipped: {len(result.skipped):,}", *parts)


def _list_section(result: ScanResult) -> str:
    listing = result.listing
    parts = []
    if listing.unmatched_count:
        parts.append(note(f"{listing.unmatched_count:,} media files are not named in the list."))
    if listing.missing:
        named = "\n".join(listing.missing[:_MOST_MISSING])
        more = f"\nand {len(listing.missing) - _MOST_MISSING:,} more" if len(listing.missing) > _MOST_MISSING else ""
        summary = f"{len(listing.missing):,} of {listing.listed_count:,} in the list are not there"
        parts.append(f"<details><summary>{summary}</summary><pre>{escape(named + more)}</pre></details>")
    return section("list", "Against the list", *parts) if parts else ""
