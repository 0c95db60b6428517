"""The HTML page of duplicates: pairs of stretches side by side, to judge the threshold by."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmacc.clips import ClipSpec, Manifest
from cmacc.search.duplicates import Duplicates, Stretch
from cmacc.search.samples import Samples
from cmacc.viewer.gallery import ClipPictures, Picture
from cmacc.viewer.page import check_out, counted, duration, render, write_page

_MOST_PAIRS = 60
_MOST_GROUPS = 200
# A spectrogram of more would show nothing; it is the middle of the stretch.
_MOST_SOUND_SECONDS = 5.0


@dataclass(frozen=True)
class _Side:
    """One of the two stretches: its images, file name, time, and ``fate``: kept, not kept, or empty."""

    pictures: list[Picture]
    name: str
    time: str
    fate: str


def write_dedupe_page(
    samples: Samples, found: Duplicates, out: Path, *, source: Manifest | None = None, overwrite: bool = False
) -> Path:
    """Write a page with pairs of stretches side by side, spread over all scores, the lowest one first.

    Parameters
    ----------
    samples
        All samples of an index.
    found
        What `near_duplicates` or `semantic_duplicates` returned for them.
    out
        Path of the page.
    source
        The manifest that was embedded; needed for packed samples.
    overwrite
        Whether an existing file may be replaced.

    Raises
    ------
    ReportError
        ``out`` is a folder, or already exists.
    SearchError
        See `Samples.manifest`.
    """
    check_out("page", out, overwrite)
    return write_page(out, render_dedupe_page(samples, found, source=source))


def render_dedupe_page(samples: Samples, found: Duplicates, *, source: Manifest | None = None) -> str:
    """Render the page as a string."""
    ascending = sorted(found.stretches, key=lambda one: one.score)
    places = np.unique(np.linspace(0, max(0, len(ascending) - 1), _MOST_PAIRS).round().astype(int))
    shown = [ascending[place] for place in places.tolist()] if ascending else []
    numbers = sorted({number for one in shown for number in (one.first, one.second)})
    sides = _Sides(samples, found, samples.manifest(numbers, source), numbers)
    names, seconds = samples.names, samples.end_seconds - samples.start_seconds
    removed = sorted(found.removed)
    return render(
        "dedupe.html.j2",
        name=Path(samples.root).name,
        sample_count=len(samples),
        headlines=[
            (f"{len(samples) - len(removed):,}", "samples to keep", f"of {len(samples):,}"),
            (
                f"{len(removed):,}",
                "samples not to keep",
                f"{duration(float(seconds[removed].sum()))}, in {counted(len(found.groups), 'group')}",
            ),
            (f"{len(found.stretches):,}", "pairs of stretches", "that are alike"),
        ],
        pairs=[(one, sides.of(one)) for one in shown],
        pair_count=len(found.stretches),
        groups=[
            (names[group[0]], ", ".join(names[number] for number in group[1:])) for group in found.groups[:_MOST_GROUPS]
        ],
        group_count=len(found.groups),
    )


class _Sides:
    """Both sides of a pair, with images of the same moments."""

    def __init__(self, samples: Samples, found: Duplicates, manifest: Manifest, numbers: list[int]) -> None:
        self._names = samples.names
        self._manifest = manifest
        self._row_of = {number: row for row, number in enumerate(numbers)}
        self._fates = dict.fromkeys(found.removed, "not kept") | {group[0]: "kept" for group in found.groups}

    def of(self, one: Stretch) -> list[_Side]:
        spans = ((one.first, one.first_seconds), (one.second, one.second_seconds))
        return [self._side(number, start, end) for number, (start, end) in spans]

    def _side(self, number: int, start: float, end: float) -> _Side:
        row, seconds = self._row_of[number], max(end - start, 0.1)
        spec = ClipSpec(
            frame_count=4,
            frame_rate_hz=4 / seconds,
            frame_height=84,
            frame_width=112,
            audio_seconds=min(seconds, _MOST_SOUND_SECONDS),
        )
        record = self._manifest.records[row]
        images, window = ClipPictures(self._manifest, spec, 64), (row, start - record.start_seconds)
        pictures = [images.frames(*window)] if record.has_picture else []
        if record.has_audio and not (pictures and not pictures[0].address):  # one message is enough
            pictures.append(images.sound(*window))
        time = f"{_clock(start)} to {_clock(end)}"
        return _Side(pictures, self._names[number], time, self._fates.get(number, ""))


def _clock(seconds: float) -> str:
    """
    >>> _clock(5.25), _clock(83.0), _clock(7200.0)
    ('0:05.2', '1:23.0', '2:00:00.0')
    """
    tenths = round(seconds * 10)
    minutes, left = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{minutes}:{left // 10:02}.{left % 10}"
    return f"{hours}:{minutes:02}:{left // 10:02}.{left % 10}" if hours else clock
