"""What the page plays and shows of a file: the file itself, parts of it, frames, spectrograms and heat-maps.

* ``/media/ID``: the file as it is, with ranges, if browsers decode it.
* ``/media/ID/part?start=3&end=9``: these seconds as MP4, which begins at 0, at most 60 s.
* ``/media/ID/frames?start=3&end=9``, ``.../sound?...``, ``.../heat?...``: pictures of them.

Work is done on a few threads; who asks for more waits. The last answers are kept in memory.
"""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, Header
from starlette.responses import FileResponse, PlainTextResponse, Response

from cmacc.app.opened import Opened
from cmacc.app.pictures import frame_strip, sound_in_picture, spectrogram
from cmacc.app.playable import Look, look_at
from cmacc.app.queries import encoder_of
from cmacc.app.rendering import without_paths
from cmacc.clips import MediaError, PackedSample, encode_part
from cmacc.pretraining.clip_encoder import EncoderError
from cmacc.search import SearchError

LONGEST_PART_SECONDS = 60.0
_SHORTEST_PART_SECONDS = 0.1
_LONGEST_FILE_SECONDS = 1e8
_THREADS = 2
_KEPT_BYTES = 64 * 2**20
_SHORT_SIDE_PIXELS = 480
_TYPES = {"part": "video/mp4", "frames": "image/jpeg", "sound": "image/png", "heat": "image/png"}
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_log = logging.getLogger(__name__)

Kind = Literal["part", "frames", "sound", "heat"]
Source = Path | PackedSample


class Kept:
    """The last answers, up to so many bytes. Safe to use from several threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._answers: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> bytes | None:
        """An answer, if it is still there."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: tuple[object, ...], answer: bytes) -> None:
        """Keep an answer, and drop those that were used longest ago."""
        with self._lock:
            self._bytes += len(answer) - len(self._answers.pop(key, b""))
            self._answers[key] = answer
            while self._bytes > self._most_bytes:
                _, dropped = self._answers.popitem(last=False)
                self._bytes -= len(dropped)

    def __len__(self) -> int:
        """Bytes that are kept."""
        return self._bytes


def media_routes(opened: Opened) -> APIRouter:
    """Routes ``/media/ID...``, for the ids of the library only."""
    router = APIRouter(prefix="/media")
    kept = Kept(_KEPT_BYTES)
    threads = anyio.CapacityLimiter(_THREADS)

    def work(source: Source, kind: Kind, start: float, end: float) -> bytes:
        if kind == "heat":
            if opened.index is None:
                raise EncoderError("where the sound is can be shown for an index only, got a run")
            return sound_in_picture(source, start, end, encoder_of(opened.index))
        if kind == "part":
            return encode_part(source, start, end, short_side_pixels=_SHORT_SIDE_PIXELS)
        look = look_at(source)
        if not (look.has_picture if kind == "frames" else look.has_sound):
            raise MediaError(f"the file has no {'picture' if kind == 'frames' else 'sound'}")
        return frame_strip(source, start, end) if kind == "frames" else spectrogram(source, start, end)

    @router.get("/{name}")
    def whole(name: str) -> Response:
        def answer(source: Source) -> Response:
            look = look_at(source)
            if isinstance(source, PackedSample) or look.media_type is None:
                return _refusal(415, "browsers do not play this file as it is; ask for a part of it")
            return FileResponse(source, media_type=look.media_type, headers=_HEADERS)

        return _answered(opened, name, answer)

    @router.get("/{name}/{kind}")
    async def part(
        name: str, kind: Kind, start: float, end: float, range: Annotated[str | None, Header()] = None
    ) -> Response:
        if not 0 <= start < end <= _LONGEST_FILE_SECONDS:
            return _refusal(422, f"start and end must be seconds, 0 <= start < end, got {start:g} and {end:g}")
        end = min(max(end, start + _SHORTEST_PART_SECONDS), start + LONGEST_PART_SECONDS)

        def answer(source: Source) -> Response:
            # The time of the last change: a file that was replaced must not show the pictures of the old one.
            key = (source, _changed(source), kind, start, end)
            content = kept.get(key)
            if content is None:
                content = work(source, kind, start, end)
                kept.put(key, content)
            return _bytes_of(content, _TYPES[kind], range)

        return await anyio.to_thread.run_sync(lambda: _answered(opened, name, answer), limiter=threads)

    return router


def look_of(opened: Opened, name: str) -> Look | str:
    """What the file of an id is; or in words, why it cannot be shown."""
    try:
        return look_at(opened.library.source(name))
    except MediaError as error:
        return without_paths(error)


def _answered(opened: Opened, name: str, answer: Callable[[Source], Response]) -> Response:
    """The answer about a file, or a line of text that says why there is none."""
    try:
        source = opened.library.source(name)
    except KeyError:
        return _refusal(404, "there is no such file on this page")
    except MediaError as error:
        return _refusal(410, without_paths(error))
    try:
        return answer(source)
    except (MediaError, EncoderError, SearchError, ValueError) as error:
        return _refusal(422, without_paths(error))
    except Exception:
        _log.exception("media %s failed", name)
        return _refusal(500, "this cannot be shown; the log of the server says why")


def _changed(source: Source) -> int:
    try:
        return Path(source.shard if isinstance(source, PackedSample) else source).stat().st_mtime_ns
    except OSError:  # at a URL
        return 0


def _bytes_of(content: bytes, media_type: str, wanted: str | None) -> Response:
    """All bytes, or the one range of them that was asked for: players seek by ranges."""
    headers = {**_HEADERS, "Accept-Ranges": "bytes"}
    match = _RANGE.fullmatch(wanted or "")
    if match is None or match.groups() == ("", ""):
        return Response(content, media_type=media_type, headers=headers)
    first, last = match.groups()
    begin = int(first) if first else max(0, len(content) - int(last))
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if not begin < stop:
        return _refusal(416, "there are no such bytes", {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {begin}-{stop - 1}/{len(content)}"
    return Response(content[begin:stop], 206, media_type=media_type, headers=headers)


def _refusal(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    always = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return PlainTextResponse(f"{text}\n", status, headers=always | (headers or {}))
