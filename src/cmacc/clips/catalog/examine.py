"""Examine one file: its properties, its problems, and its perceptual fingerprints.

There are three passes, each cheaper than the next: the bytes (hash), all packets without decoding (time stamps, ends,
damage that the container detects), and a few windows. These are decoded strictly, so that a frame that FFmpeg would
silently conceal counts as damaged. Damage between the windows is not detected.

An undamaged file is opened twice: once for its hash, and once by FFmpeg for the rest. This takes 0.61 of the time of
six openings (200 clips of GRID, benchmarks/scanning.py). If the strict decoder fails, each part is read again from a
newly opened file.

Trap: AAC decoders fill high bands with pseudo-random noise, so the audio of a window depends slightly on what was
decoded before. The order is fixed, and so are the results; another order changes up to 4 of the 192 bits of a
fingerprint.
"""

import base64
import dataclasses
import hashlib
import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from cmacc.clips.catalog.fingerprint import picture_bits, sound_bits
from cmacc.clips.clip import Clip, ClipSpec, MediaError
from cmacc.clips.media.container import (
    Medium,
    is_cover_image,
    packet_end_seconds,
    stated_end_seconds,
    stated_frames,
    stated_seconds,
    states_no_length,
    stream_start_seconds,
    streams,
)
from cmacc.clips.media.decoding import MediaInfo, OpenFile, read_info
from cmacc.clips.media.sound import mono
from cmacc.clips.windows import spread_starts

# Increase it when the examination of the same bytes would give other results. This invalidates older journal entries.
VERSION = 3
# Names of findings and their meanings.
FINDINGS = {
    "unreadable": "cannot be opened, or nothing in it can be decoded",
    "corrupt": "part of the file is damaged or missing",
    "too_short": "shorter than the minimum length",
    "no_audio": "no audio",
    "no_picture": "no video",
    "silent": "audio is silent",
    "black": "video is black",
    "still": "video does not change",
    "variable_frame_rate": "intervals between frames are not constant",
    "offset": "audio and video start at different times",
    "audio_shorter": "audio ends before video",
    "duplicate": "same bytes as another file",
    "near_duplicate": "looks and sounds like another file",
}
"""What a scan may find in a file, by name, in words."""
_WINDOWS = 3
_SPEC = ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=72, frame_width=96, audio_seconds=1.0)
_SILENT_DBFS = -60.0
_BLACK_LEVEL = 20.0  # of 255; allows for limited-range black and noise
_STILL_LEVELS = 2.0  # of means over 8 x 8 pixels; compression noise of a still picture averages out to less
_OFFSET_SECONDS = 0.1
_MISSING_SECONDS = 0.5


@dataclass(frozen=True)
class Finding:
    """A finding about a file: a name in `FINDINGS`, and a description of the details."""

    name: str
    detail: str


@dataclass(frozen=True)
class Examination:
    """Result of the examination of a file.

    Attributes
    ----------
    content_hash, size_bytes
        SHA-256 of the file, in hex, and its size.
    info
        Properties of the file; None if it is unreadable.
    findings
        Problems and peculiarities.
    loudness_dbfs
        Root mean square of the audio of the windows, relative to full scale; None without audio.
    picture_print, sound_print
        Fingerprints, in hex; None without video or audio, or if a window is featureless.
    thumbnail
        A small JPEG of a frame from the middle, in base64; None without video.
    """

    content_hash: str
    size_bytes: int
    info: MediaInfo | None
    findings: tuple[Finding, ...]
    loudness_dbfs: float | None = None
    picture_print: str | None = None
    sound_print: str | None = None
    thumbnail: str | None = None

    def has(self, name: str) -> bool:
        """Whether there is a finding of that name."""
        return any(finding.name == name for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Convert to types that JSON supports."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Examination":
        """Create from the output of `to_json`."""
        info = data["info"]
        return cls(
            **data | {"info": info and MediaInfo(**info), "findings": tuple(Finding(**f) for f in data["findings"])}
        )


def unreadable(reason: str, size_bytes: int = 0) -> Examination:
    """The result for a file that could not be examined; it must not be opened again."""
    return Examination("", size_bytes, None, (Finding("unreadable", reason),))


def examine(path: Path) -> dict[str, Any]:
    """Examine a file; returns `Examination.to_json`, which `guarded` can transfer.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    digest, size = _hash(path)
    try:
        info, packets, clips, faults = _read(path)
    except MediaError as error:
        return Examination(digest, size, None, (Finding("unreadable", _reason(error, path)),)).to_json()
    findings = _packet_findings(packets, info)
    if not clips:
        return Examination(digest, size, None, (Finding("unreadable", faults[0]),)).to_json()
    if faults:
        findings.insert(0, Finding("corrupt", "; ".join(dict.fromkeys(faults))))
    picture = np.stack([clip.frames.numpy() for clip in clips]) if info.width else None
    sound = np.stack([clip.waveform.numpy() for clip in clips]) if info.has_audio else None
    findings += _picture_findings(picture) + _sound_findings(path, info, sound)
    whole = len(clips) == _WINDOWS  # fingerprints of fewer windows are not comparable
    return Examination(
        content_hash=digest,
        size_bytes=size,
        info=info,
        findings=tuple(findings),
        loudness_dbfs=None if sound is None else round(_loudness_dbfs(sound), 1),
        picture_print=_print([picture_bits(frames[1]) for frames in picture])
        if whole and picture is not None
        else None,
        sound_print=_print([sound_bits(s, _SPEC.sample_rate_hz) for s in sound])
        if whole and sound is not None
        else None,
        thumbnail=None if picture is None else _jpeg(picture[len(picture) // 2, 1]),
    ).to_json()


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _reason(error: MediaError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


@dataclass
class _Packets:
    """Facts from the time stamps of all packets, in seconds on the file's clock; dictionaries are by stream index."""

    video: int | None
    audio: int | None
    starts: dict[int, float]  # as stated by the container
    stated_frames: int
    stated_seconds: float | None  # of the video, if the container states it
    stated_end: float | None  # of the longest of all streams in the file
    times: dict[int, list[float]]
    ends: dict[int, float]
    damaged: list[float]
    fault: str | None = None  # why the packets could not be read to the end


_Reading = tuple[MediaInfo, _Packets, list[Clip], list[str]]


def _read(path: Path) -> _Reading:
    """Properties, packets, the clips of the windows, and the errors of windows that do not decode.

    Raises
    ------
    MediaError
        The file is unreadable.
    """
    with suppress(MediaError):
        return _read_at_once(path)
    return _read_in_parts(path)


def _read_at_once(path: Path) -> _Reading:
    """Read everything from one open container; any damage is an error."""
    medium = Medium.file(path)
    with medium.open() as container:
        file = _strict(medium, container)
        packets = _read_packets(medium, container)  # first, because after a seek some formats do not return all of them
        if packets.fault is not None:
            raise MediaError(f"{path}: {packets.fault}")
        container.seek(0)
        info = read_info(medium, container, packets.ends)
        return info, packets, file.clips(_starts(info), _SPEC), []


def _read_in_parts(path: Path) -> _Reading:
    """Read each part from a newly opened container, so that damage to one does not affect the others."""
    medium = Medium.file(path)
    with medium.open() as container:
        packets = _read_packets(medium, container)
    with medium.open() as container:
        info = read_info(medium, container, packets.ends)
    clips: list[Clip] = []
    faults: list[str] = []
    for start in _starts(info):
        try:
            with medium.open() as container:
                clips += _strict(medium, container).clips([start], _SPEC)
        except MediaError as error:
            faults.append(f"at {max(0.0, start):.1f} s: {_reason(error, path)}")
    return info, packets, clips, faults


def _starts(info: MediaInfo) -> list[float]:
    # A file shorter than a window has the same window three times, so that all fingerprints have the same length.
    return spread_starts(info.duration_seconds, _SPEC.length_seconds, _WINDOWS)


def _strict(medium: Medium, container: InputContainer) -> OpenFile:
    """The file, with decoders that raise errors instead of concealing them."""
    file = OpenFile([(medium, container)])
    for stream in (*container.streams.video, *container.streams.audio):
        stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
    return file


def _read_packets(medium: Medium, container: InputContainer) -> _Packets:
    """Demux a newly opened file to its end."""
    video, audio = streams(container, medium.name)
    present = [stream for stream in (video, audio) if stream is not None]
    found = _Packets(
        video=None if video is None else video.index,
        audio=None if audio is None else audio.index,
        starts={stream.index: stream_start_seconds(stream) for stream in present},
        stated_frames=0 if video is None else stated_frames(container, video),
        stated_seconds=None if video is None else stated_seconds(container, video),
        stated_end=stated_end_seconds(container),
        times={},
        ends={},
        damaged=[],
    )
    last = 0.0
    try:
        # Include other streams, since the stated end is that of the longest stream.
        for packet in container.demux([s for s in container.streams if not is_cover_image(s)]):
            stream, end = packet.stream_index, packet_end_seconds(packet)
            if end is not None:
                found.ends[stream] = max(end, found.ends.get(stream, end))
            if stream not in found.starts:
                continue
            if end is not None:
                last = end - float((packet.duration or 0) * packet.time_base)
                found.times.setdefault(stream, []).append(last)
            if packet.is_corrupt:
                found.damaged.append(last)
    except (av.FFmpegError, ValueError) as error:
        found.fault = f"cannot be read after {last:.1f} s ({type(error).__name__})"
    if found.damaged == [last] and isinstance(medium.content, Path) and states_no_length(medium.content):
        found.damaged.clear()  # FFmpeg reports damage because the file ends within one of FFmpeg's packets
    return found


def _packet_findings(packets: _Packets, info: MediaInfo) -> list[Finding]:
    findings = []
    video, audio, ends, damaged = packets.video, packets.audio, packets.ends, packets.damaged
    if packets.fault is not None:
        findings.append(Finding("corrupt", packets.fault))
    if damaged:
        findings.append(Finding("corrupt", f"{len(damaged)} damaged packets, the first at {damaged[0]:.1f} s"))
    if video is not None and video in packets.times:
        times = packets.times[video]
        until, stated = ends[video] - packets.starts[video], packets.stated_seconds
        if stated is not None and stated - until > _MISSING_SECONDS:
            findings.append(Finding("corrupt", f"the picture ends at {until:.1f} s of the stated {stated:.1f} s"))
        # If a container states one length for all streams, video that is shorter than that is not damaged.
        until, end = max(ends.values()), packets.stated_end
        if stated is None and end is not None and end - until > _MISSING_SECONDS:
            findings.append(Finding("corrupt", f"the file ends at {until:.1f} s of the stated {end:.1f} s"))
        if packets.stated_frames > 1.02 * len(times) + 2:
            present = f"{len(times):,} of the stated {packets.stated_frames:,} frames are there"
            findings.append(Finding("corrupt", present))
        findings += _rate_findings(np.diff(np.sort(times)))
    if video in ends and audio in ends and info.has_audio:
        offset = packets.starts[audio] - packets.starts[video]
        if abs(offset) > _OFFSET_SECONDS:
            side = "after" if offset > 0 else "before"
            findings.append(Finding("offset", f"the sound begins {abs(offset):.2f} s {side} the picture"))
        lacking = ends[video] - ends[audio]
        if lacking > _MISSING_SECONDS:
            findings.append(Finding("audio_shorter", f"the sound ends {lacking:.1f} s before the picture"))
    return findings


def _rate_findings(gaps: NDArray[np.float64]) -> list[Finding]:
    if len(gaps) < 3:
        return []
    middle = float(np.median(gaps))
    uneven = np.abs(gaps - middle) > max(0.1 * middle, 0.0025)  # Matroska rounds to whole milliseconds
    if uneven.mean() <= 0.01:
        return []
    detail = (
        f"{uneven.mean():.0%} of the steps differ from {middle * 1000:.1f} ms; the longest lasts {gaps.max():.2f} s"
    )
    return [Finding("variable_frame_rate", detail)]


def _picture_findings(picture: NDArray[np.uint8] | None) -> list[Finding]:
    """``picture`` is (windows, frames, height, width, 3)."""
    if picture is None:
        return [Finding("no_picture", "the file has none")]
    level = float(picture.mean())
    if level < _BLACK_LEVEL and np.quantile(picture, 0.99) < 2 * _BLACK_LEVEL:
        return [Finding("black", f"mean level {level:.0f} of 255")]
    fields = picture.reshape(-1, _SPEC.frame_height // 8, 8, _SPEC.frame_width // 8, 8, 3).mean((2, 4, 5))
    change = float(np.abs(fields - fields[0]).max())
    if change < _STILL_LEVELS:
        return [Finding("still", f"no part of the frames looked at changes by more than {change:.1f} levels of 255")]
    return []


def _sound_findings(path: Path, info: MediaInfo, sound: NDArray[np.float32] | None) -> list[Finding]:
    """``sound`` is (windows, samples)."""
    if sound is None:
        return [Finding("no_audio", "the file has none")]
    if _loudness_dbfs(sound) >= _SILENT_DBFS:
        return []
    # A short sound within padding, as in ESC-50, may lie between the windows. So decode all of the audio before calling
    # a file silent.
    loudest, second, count = -120.0, [np.zeros(0, np.float32)], 0
    try:
        with Medium.file(path).open() as container:
            _, audio = streams(container, str(path))
            for frame in container.decode(audio) if audio is not None else ():
                second.append(mono(frame))
                count += frame.samples
                if count >= info.audio_rate_hz:
                    loudest = max(loudest, _loudness_dbfs(np.concatenate(second)))
                    second, count = [], 0
                if loudest >= _SILENT_DBFS:
                    return []
    except MediaError as error:
        return [Finding("corrupt", _reason(error, path))]
    if count:
        loudest = max(loudest, _loudness_dbfs(np.concatenate(second)))
    if loudest >= _SILENT_DBFS:
        return []
    return [Finding("silent", f"its loudest second has {loudest:.0f} dB of full scale")]


def _loudness_dbfs(sound: NDArray[np.float32]) -> float:
    return max(-120.0, 10 * float(np.log10(np.mean(np.square(sound, dtype=np.float64)) + 1e-12)))


def _print(views: list[bytes | None]) -> str | None:
    """The bits of all views in hex; None if one view is featureless."""
    return None if any(view is None for view in views) else b"".join(view or b"" for view in views).hex()


def _jpeg(frame: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=70)
    return base64.b64encode(buffer.getvalue()).decode()
