"""The results of a search as HTML. Players and pictures load when they come into view, heat-maps when asked for."""

import base64
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cmacc.app.media import LONGEST_PART_SECONDS, look_of
from cmacc.app.opened import Opened
from cmacc.app.pictures import (
    FRAME_HEIGHT,
    FRAME_WIDTH,
    FRAMES,
    SPECTROGRAM_HEIGHT,
    SPECTROGRAM_WIDTH,
    frame_strip,
    spectrogram,
)
from cmacc.app.playable import Look, look_at
from cmacc.app.queries import Asked, AskError, Found, Picked, Uploaded, Words
from cmacc.app.rendering import render
from cmacc.clips import MediaError, probe
from cmacc.search import Moment

_TIME = re.compile(r"(\d{1,3}:){0,2}\d{1,6}(\.\d{0,3})?", re.ASCII)
# A part that is re-encoded begins a little before the moment and ends a little after it.
_AROUND_SECONDS = 2.0
# Pictures show at least so much around a short moment.
_LEAST_SHOWN_SECONDS = 1.0
# Of a query that is searched for as a whole, its start.
_QUERY_SHOWN_SECONDS = 10.0

SCRIPT = (Path(__file__).parent / "templates" / "results.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Card:
    """A result as it is shown.

    Attributes
    ----------
    name, id
        What the file is called on the page, and its id in the library.
    label
        Its label; empty if it has none.
    start, end
        Seconds of the moment on the file's clock.
    player
        Address that plays at the moment; empty if there is nothing to play.
    plays_part
        Whether only seconds around the moment are played, which are re-encoded.
    look
        What the file is; None if it cannot be shown.
    fault
        Why not, in words.
    """

    name: str
    id: str
    label: str
    start: float
    end: float
    player: str
    plays_part: bool
    look: Look | None
    fault: str = ""


def card_of(opened: Opened, path: str, key: str | None, start: float, end: float, *, label: str = "") -> Card:
    """The card of a moment of a file of the index, by its path relative to the root."""
    assert opened.index is not None
    name = opened.library.id_of_row(f"{opened.index.table.description.root}/{path}", key)
    look = look_of(opened, name)
    player = ""
    part = False
    if isinstance(look, Look):
        if look.media_type is None:
            part = True
            begin = max(0.0, start - _AROUND_SECONDS)
            stop = min(end + _AROUND_SECONDS, begin + LONGEST_PART_SECONDS)
            player = f"/media/{name}/part?start={begin:.3f}&end={stop:.3f}#t={start - begin:.3f}"
        elif not look.media_type.startswith("image/"):
            player = f"/media/{name}#t={start:.3f}"
    shown, fault = (look, "") if isinstance(look, Look) else (None, look)
    return Card(key or path, name, label, start, end, player, part, shown, fault)


def found_html(opened: Opened, asked: Asked, found: Found) -> str:
    """The page of an answer: the query, and a card for each moment; or what it means that nothing was found."""
    assert opened.index is not None
    root = opened.index.table.description.root
    cards = []
    for moment in found.answer.moments:
        path = moment.path.removeprefix(f"{root}/")
        card = card_of(opened, path, moment.key, moment.start_seconds, moment.end_seconds, label=moment.label or "")
        cards.append((card, _in_words(moment)))
    query = None
    if isinstance(asked.query, Picked):
        begin = asked.start_seconds or 0.0
        end = begin + _QUERY_SHOWN_SECONDS if asked.end_seconds is None else asked.end_seconds
        query = card_of(opened, asked.query.path, asked.query.key, begin, end)
    return render(
        "results.html.j2",
        clock=clock,
        shown=_shown,
        strip_size=(FRAMES * FRAME_WIDTH, FRAME_HEIGHT),
        spectrogram_size=(SPECTROGRAM_WIDTH, SPECTROGRAM_HEIGHT),
        cards=cards,
        query=query,
        upload=_pictures_of_upload(asked, asked.query) if isinstance(asked.query, Uploaded) else (),
        asked=asked,
        part_in_words=_part_in_words(asked, found),
        found=found,
        several_ways=len({words[0] for _, words in cards}) > 1,
    )


def _pictures_of_upload(asked: Asked, query: Uploaded) -> list[tuple[str, str]]:
    """Addresses that hold the pictures themselves, and what they show: the library has no uploads."""
    begin = asked.start_seconds or 0.0
    end = begin + _QUERY_SHOWN_SECONDS if asked.end_seconds is None else asked.end_seconds
    shown = []
    with suppress(MediaError):  # beyond the part that was searched with
        look, length = look_at(query.path), probe(query.path).duration_seconds
        end = max(min(end, length), begin + 0.1)
        if look.has_picture:
            strip = frame_strip(query.path, begin, end, 1 if query.is_picture else FRAMES)
            shown.append((f"data:image/jpeg;base64,{base64.b64encode(strip).decode()}", "frames"))
        if look.has_sound:
            sound = spectrogram(query.path, begin, end)
            shown.append((f"data:image/png;base64,{base64.b64encode(sound).decode()}", "sound"))
    return shown


def _in_words(moment: Moment) -> tuple[str, str]:
    """What matched, and how near it is."""
    found = {"video": "picture", "audio": "sound"}[moment.modality]
    by = {"video": "the picture of your query", "audio": "the sound of your query", "text": "your words"}[moment.by]
    percentile = moment.percentile
    if percentile >= 99.999:
        near = "nearer than all of 100,000 random pairs of this collection"
    else:
        digits = 3 if percentile > 99.9 else 1 if percentile < 99 else 2
        near = f"nearer than {percentile:.{digits}f} % of random pairs of this collection"
    return f"Its {found} fits {by}", near


def _part_in_words(asked: Asked, found: Found) -> str:
    if isinstance(asked.query, Words):
        return "words"
    by = "by picture and sound" if len(found.by) > 1 else "by its picture" if found.by == ("video",) else "by its sound"
    if isinstance(asked.query, Uploaded) and asked.query.is_picture:
        return by
    if asked.start_seconds is None and asked.end_seconds is None:
        return by
    end = "its end" if asked.end_seconds is None else clock(asked.end_seconds)
    return f"{by}, {clock(asked.start_seconds or 0.0)} to {end}"


def clock(seconds: float) -> str:
    """A time on a file's clock.

    Examples
    --------
    >>> clock(3.14), clock(75.0), clock(3_723.45), clock(59.97)
    ('0:03.1', '1:15.0', '1:02:03.4', '1:00.0')
    """
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{head}:{rest // 10:02}.{rest % 10}"


def seconds_of(text: str | None) -> float | None:
    """Seconds from what a visitor types, such as 12.5 or 1:02:03.4; None for nothing.

    Raises
    ------
    AskError
        It is no time.

    Examples
    --------
    >>> seconds_of("12.5"), seconds_of("1:02:03.4"), seconds_of(" ")
    (12.5, 3723.4, None)
    """
    if not text or not text.strip():
        return None
    if not _TIME.fullmatch(text.strip()):
        raise AskError(f"“From” and “to” must be seconds, or minutes and seconds as 1:15, got {text.strip()[:20]}.")
    parts = reversed(text.strip().split(":"))
    return round(sum(float(part) * 60.0**place for place, part in enumerate(parts)), 3)


def _shown(card: Card) -> str:
    """The part that pictures of a card show, as a query string."""
    start, end = card.start, card.end
    if end - start < _LEAST_SHOWN_SECONDS:
        start = max(0.0, (start + end - _LEAST_SHOWN_SECONDS) / 2)
        end = start + _LEAST_SHOWN_SECONDS
    return f"start={max(0.0, start):.3f}&end={end:.3f}"
