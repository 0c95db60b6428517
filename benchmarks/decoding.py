"""Clips a second of one core: cmacc against torchcodec, decord and a plain PyAV loop, on raw and on packed files.

A clip is the default `ClipSpec`: 16 frames at 16 fps, scaled to cover 112 x 112 and cut about the centre, and 2 s of
mono sound at 16 kHz. Every reader delivers the same: the frames on show at the same times, scaled inside the decoder
where it can, and the same span of sound, both as arrays of the clip's size, from the same random windows. The readers
take turns within each round, the best of the rounds counts and their spread is told. The process keeps to one core,
and a rate is clips per second of processor time, all threads counted; by the wall clock it is told beside it.

What the readers give is compared with a decoding of the whole file from its beginning to its end: by how many levels
the frames differ (scalers do, by one or two), how many are not the frame on show (another of the file's is nearer),
and how many milliseconds the sound is off.

torchcodec and decord are left out where they are not installed; a reader that fails is told with its reason. The film
is made of UCF101's clips where they are on the machine (``../shared/data/real``), else it is a made-up moving picture.

``python benchmarks/decoding.py --out benchmarks/results/decoding-cpu.json``: about six minutes on a CPU.
"""

import os

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soxr
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cmacc.clips import ClipSpec, Manifest, MediaRecord, decode_clips, probe
from cmacc.clips.packing.shards import pack
from cmacc.clips.storage import PackedSample, read_extent

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "real"
SPEC = ClipSpec()
FILM_RATE, SOUND_RATE = 30, 44_100
LIBRARIES = ("av", "decord", "numpy", "soxr", "torch", "torchcodec", "torchvision")
# A frame counts as wrong where another one of the film is nearer to it by so many levels.
NEARER_LEVELS = 0.25

# Frames (T, height, width, 3) uint8 and sound (S,) float32 of one clip.
Made = tuple[NDArray[np.uint8], NDArray[np.float32]]


@dataclass(frozen=True)
class Film:
    """One file: as cmacc is given it, and as files of picture and sound (the same one, unless packed)."""

    ours: Path | PackedSample
    picture: Path
    sound: Path | None
    seconds: float
    height: int  # to which the picture is scaled before it is cut
    width: int


@dataclass(frozen=True)
class Case:
    """Films, and the starts of the windows to take from each."""

    name: str
    films: list[Film]
    starts: list[list[float]]


class Heard(NamedTuple):
    """Sound next to what it should be."""

    late_ms: float
    gain: float
    error: float


# ---- the readers ----------------------------------------------------------------------------------------------------


def _cut(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top, left = (frames.shape[1] - SPEC.frame_height) // 2, (frames.shape[2] - SPEC.frame_width) // 2
    return np.ascontiguousarray(frames[:, top : top + SPEC.frame_height, left : left + SPEC.frame_width])


def _whole(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zeros after the end of the file."""
    return np.pad(samples[: SPEC.sample_count], (0, max(0, SPEC.sample_count - len(samples))))


def read_with_cmacc(film: Film, starts: Sequence[float]) -> list[Made]:
    return [(clip.frames.numpy(), clip.waveform.numpy()) for clip in decode_clips(film.ours, starts, SPEC)]


def read_with_torchcodec(film: Film, starts: Sequence[float], seek_mode: Any = "approximate") -> list[Made]:
    """Scaled by its filter graph; all frames of all clips asked for at once."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder
    from torchcodec.transforms import Resize

    decoder = VideoDecoder(
        film.picture,
        dimension_order="NHWC",
        num_ffmpeg_threads=1,
        seek_mode=seek_mode,
        transforms=[Resize((film.height, film.width))],
    )
    times = np.concatenate([SPEC.frame_times(start) for start in starts]) + (decoder.metadata.begin_stream_seconds or 0)
    pictures = np.split(decoder.get_frames_played_at(torch.from_numpy(times)).data.numpy(), len(starts))
    sounds = [np.zeros(SPEC.sample_count, np.float32) for _ in starts]
    if film.sound is not None:
        listener = AudioDecoder(film.sound, sample_rate=SPEC.sample_rate_hz, num_channels=1)
        spans = [listener.get_samples_played_in_range(start, start + SPEC.audio_seconds) for start in starts]
        sounds = [_whole(span.data[0].numpy()) for span in spans]
    return [(_cut(frames), sound) for frames, sound in zip(pictures, sounds, strict=True)]


def read_with_torchcodec_exact(film: Film, starts: Sequence[float]) -> list[Made]:
    return read_with_torchcodec(film, starts, "exact")


def read_with_decord(film: Film, starts: Sequence[float]) -> list[Made]:
    """It knows frames by number only; its AudioReader decodes the whole file when it is opened."""
    import decord

    reader = decord.VideoReader(str(film.picture), width=film.width, height=film.height, num_threads=1)
    times = np.concatenate([SPEC.frame_times(start) for start in starts])
    numbers = np.minimum(np.floor(times * reader.get_avg_fps() + 1e-6).astype(int), len(reader) - 1)
    pictures = np.split(reader.get_batch(numbers.tolist()).asnumpy(), len(starts))
    sounds = [np.zeros(SPEC.sample_count, np.float32) for _ in starts]
    if film.sound is not None:
        samples = decord.AudioReader(str(film.sound), sample_rate=SPEC.sample_rate_hz, mono=True)
        for place, start in enumerate(starts):
            first = round(start * SPEC.sample_rate_hz)
            last = min(first + SPEC.sample_count, samples.shape[1])
            sounds[place] = _whole(samples[first:last].asnumpy()[0])
    return [(_cut(frames), sound) for frames, sound in zip(pictures, sounds, strict=True)]


def read_with_pyav(film: Film, starts: Sequence[float]) -> list[Made]:
    """The loop of a careful user: one scaler for all frames, and only the frames that are kept are scaled."""
    clips = []
    with av.open(str(film.picture)) as container:
        pictures = [_pyav_picture(container, SPEC.frame_times(start), film) for start in starts]
        if film.sound == film.picture:
            clips = [_pyav_sound(container, start) for start in starts]
    if film.sound is not None and film.sound != film.picture:
        with av.open(str(film.sound)) as container:
            clips = [_pyav_sound(container, start) for start in starts]
    return list(zip(pictures, clips or [np.zeros(SPEC.sample_count, np.float32) for _ in starts], strict=True))


def _pyav_picture(container: Any, times: NDArray[np.float64], film: Film) -> NDArray[np.uint8]:
    stream = container.streams.video[0]
    if not stream.codec_context.is_open:
        stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
    tick = float(stream.time_base)
    times = times + (stream.start_time or 0) * tick
    container.seek(int(times[0] / tick), stream=stream, backward=True)
    scaler = VideoReformatter()
    kept: list[NDArray[np.uint8]] = []
    shown = None
    for frame in container.decode(stream):
        while shown is not None and len(kept) < len(times) and times[len(kept)] < frame.pts * tick:
            kept.append(_pyav_scaled(scaler, shown, film))
        if len(kept) == len(times):
            break
        shown = frame
    kept += [_pyav_scaled(scaler, shown, film)] * (len(times) - len(kept))
    return _cut(np.stack(kept))


def _pyav_scaled(scaler: VideoReformatter, frame: Any, film: Film) -> NDArray[np.uint8]:
    scaled = scaler.reformat(frame, film.width, film.height, "rgb24", interpolation="BILINEAR", threads=1)
    return np.asarray(scaled.to_ndarray())


def _pyav_sound(container: Any, start: float) -> NDArray[np.float32]:
    stream = container.streams.audio[0]
    tick = float(stream.time_base)
    container.seek(max(0, int((start - 0.1) / tick)), stream=stream, backward=True)
    resampler = av.AudioResampler("fltp", "mono", SPEC.sample_rate_hz)
    parts: list[NDArray[np.float32]] = []
    first, count = 0, 0
    for frame in container.decode(stream):
        if not parts:
            first = round((start - frame.pts * tick) * SPEC.sample_rate_hz)
        parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        count = sum(map(len, parts))
        if count >= first + SPEC.sample_count:
            break
    else:
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return _whole(np.concatenate(parts)[max(0, first) :])


READERS: dict[str, tuple[str | None, Callable[[Film, Sequence[float]], list[Made]]]] = {
    "cmacc": (None, read_with_cmacc),
    "torchcodec, approximate": ("torchcodec", read_with_torchcodec),
    "torchcodec, exact": ("torchcodec", read_with_torchcodec_exact),
    "decord": ("decord", read_with_decord),
    "PyAV loop": (None, read_with_pyav),
}


# ---- the films ------------------------------------------------------------------------------------------------------


def real_film(seconds: float) -> tuple[list[NDArray[np.uint8]], NDArray[np.float32]] | None:
    """UCF101's clips one after another, each frame once: frames (height, width, 3), and stereo sound (2, samples)."""
    folder = next((REAL / name for name in ("ucf101_original", "ucf101") if (REAL / name).is_dir()), None)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".avi", ".mp4")) if folder else []
    frames: list[NDArray[np.uint8]] = []
    sounds: list[NDArray[np.float32]] = []
    for path in files[:: max(1, len(files) // 12)]:
        with av.open(str(path)) as container:
            if not container.streams.audio or len(frames) >= seconds * FILM_RATE:
                continue
            pictures = [frame.to_ndarray(format="rgb24", width=320, height=240) for frame in container.decode(video=0)]
        with av.open(str(path)) as container:
            resampler = av.AudioResampler("fltp", "stereo", SOUND_RATE)
            heard = [part.to_ndarray() for f in container.decode(audio=0) for part in resampler.resample(f)]
        span = len(pictures) * SOUND_RATE // FILM_RATE
        sound = np.concatenate(heard, axis=1)[:, :span]
        frames += pictures
        sounds.append(np.pad(sound, ((0, 0), (0, span - sound.shape[1]))))
    return (frames, np.concatenate(sounds, axis=1)) if frames else None


def made_up_film(seconds: float, height: int, width: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.float32]]:
    """A grainy pattern that drifts and changes in brightness, and a gliding tone in noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8, 2 * width // 8, 3)).repeat(8, 0).repeat(8, 1)
    pattern = np.clip(coarse * 0.8 + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)
    count = round(seconds * FILM_RATE)
    frames = [np.roll(pattern, (i, 3 * i), (0, 1))[:, :width] // 2 + np.uint8(64 + 2 * (i % 32)) for i in range(count)]
    clock = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    tone = 0.3 * np.sin(2 * np.pi * (300 + 50 * clock) * clock) + rng.normal(0, 0.05, len(clock))
    return frames, np.stack([tone, 0.5 * tone]).astype(np.float32)


def write_film(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    sound: NDArray[np.float32] | None,
    keyframe_every: int,
    size: tuple[int, int] | None = None,
) -> Path:
    """An .mp4 as most are: x264 medium at crf 23 with B-frames, AAC stereo. ``size`` is (height, width)."""
    height, width = size or frames[0].shape[:2]
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=FILM_RATE)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        options = {"preset": "medium", "crf": "23", "g": str(keyframe_every), "x264-params": "scenecut=0"}
        video.codec_context.options = options
        audio = file.add_stream("aac", rate=SOUND_RATE, layout="stereo") if sound is not None else None
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels).reformat(width, height, "yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = number, Fraction(1, FILM_RATE)
            file.mux(video.encode(frame))
            if audio is not None and sound is not None and number % FILM_RATE == 0:
                first = number * SOUND_RATE // FILM_RATE
                chunk = sound[:, first : first + SOUND_RATE]
                part = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk), format="fltp", layout="stereo")
                part.sample_rate, part.pts, part.time_base = SOUND_RATE, first, Fraction(1, SOUND_RATE)
                file.mux(audio.encode(part))
        file.mux(video.encode(None))
        if audio is not None:
            file.mux(audio.encode(None))
    return path


def film_of(path: Path) -> Film:
    """A file as it is."""
    info = probe(path)
    height, width = _covering(info.height, info.width)
    return Film(path, path, path if info.has_audio else None, info.duration_seconds, height, width)


def packed_film(path: Path, folder: Path) -> Film:
    """The packed form of a file: as a sample of a shard for us, as an .mp4 and a .flac for the others."""
    info = probe(path)
    record = MediaRecord(path, info.duration_seconds, info.fps, info.width, info.height, True, info.audio_rate_hz)
    pack(Manifest([record]), folder / "packed")
    packed = Manifest.read(folder / "packed" / "index.parquet").records[0]
    source = packed.source
    assert isinstance(source, PackedSample)
    assert source.video is not None
    assert source.audio is not None
    picture, sound = folder / "packed.mp4", folder / "packed.flac"
    picture.write_bytes(read_extent(source.shard, source.video))
    sound.write_bytes(read_extent(source.shard, source.audio))
    return Film(source, picture, sound, packed.duration_seconds, *_covering(packed.height, packed.width))


def _covering(height: int, width: int) -> tuple[int, int]:
    scale = max(SPEC.frame_height / height, SPEC.frame_width / width)
    return max(SPEC.frame_height, round(height * scale)), max(SPEC.frame_width, round(width * scale))


def cases_of(folder: Path, quick: bool, clips: int) -> tuple[list[Case], str]:
    """What to read, and what the film is made of."""
    rng = np.random.default_rng(7)

    def case(name: str, films: list[Film], each: int) -> Case:
        starts = [rng.uniform(0, film.seconds - SPEC.length_seconds, each).tolist() for film in films]
        return Case(name, films, starts)

    found = None if quick else real_film(45.0)
    frames, sound = found or (made_up_film(6.0, 120, 160) if quick else made_up_film(45.0, 240, 320))
    raw = write_film(folder / "raw.mp4", frames, sound, 250)
    cases = [
        case("raw", [film_of(raw)], clips),
        case("raw, keyframe every 25", [film_of(write_film(folder / "raw25.mp4", frames, sound, 25))], clips),
        case("raw, no sound", [film_of(write_film(folder / "silent.mp4", frames, None, 250))], clips),
    ]
    if not quick:
        large = write_film(folder / "large.mp4", frames, sound, 250, (360, 640))
        cases.append(case("raw, 640x360", [film_of(large)], clips))
        grid = sorted((REAL / "grid" / "clips").glob("*.mp4"))[: clips // 2]
        if grid:
            cases.append(case("GRID", [film_of(path) for path in grid], 4))
    cases.append(case("packed", [packed_film(raw, folder)], 4 * clips))
    # The packed file is asked for the windows of the raw one, and for more of them, since it is quick.
    cases[-1].starts[0][:clips] = cases[0].starts[0]
    height, width = frames[0].shape[:2]
    origin = "UCF101 clips one after another" if found else "made up"
    return cases, f"{origin}, {len(frames) / FILM_RATE:.1f} s, {width}x{height}, {FILM_RATE} fps"


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(cases: list[Case], readers: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rates of every case, reader and number of clips an opening; what fails is told with its reason."""
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    failed: dict[tuple[str, str, int], str] = {}
    counts = {case.name: sum(map(len, case.starts)) for case in cases}
    for _ in range(rounds):
        for case in cases:
            for k in (1, 4):
                for name in readers:
                    key = case.name, name, k
                    if key in failed:
                        continue
                    try:
                        times.setdefault(key, []).append(_timed(case, READERS[name][1], k))
                    except Exception as error:
                        failed[key] = f"{type(error).__name__}: {error}"[:300]
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys([*times, *failed]):
        row: dict[str, Any] = dict(zip(("case", "reader", "clips_per_open"), key, strict=True))
        if key in failed:
            rows.append(row | {"failed": failed[key]})
            continue
        rates = [counts[key[0]] / seconds for seconds, _ in times[key]]
        row |= {
            "clips_per_second": max(rates),
            "spread": max(rates) / min(rates) - 1,
            "median_of_rounds": statistics.median(rates),
            "clips_per_wall_second": max(counts[key[0]] / seconds for _, seconds in times[key]),
        }
        rows.append(row)
    return rows


def _timed(case: Case, read: Callable[[Film, Sequence[float]], list[Made]], k: int) -> tuple[float, float]:
    """Seconds of processor time and of the wall clock."""
    began, began_wall = time.process_time(), time.perf_counter()
    for film, starts in zip(case.films, case.starts, strict=True):
        for first in range(0, len(starts), k):
            clips = read(film, starts[first : first + k])
            assert len(clips) == len(starts[first : first + k])
    return time.process_time() - began, time.perf_counter() - began_wall


def compare(case: Case, readers: list[str], clips: int) -> list[dict[str, Any]]:
    """What each reader gives, next to a decoding of the whole file without any seeking."""
    rows = []
    truths = [(_all_frames(film), _all_sound(film)) for film in case.films]
    for name in readers:
        differences: list[float] = []
        wrong, frame_counts = 0, set()
        heard: list[Heard] = []
        try:
            for film, starts, ((begins, pictures), sound) in zip(case.films, case.starts, truths, strict=True):
                for start in starts[: max(1, clips // len(case.films))]:
                    frames, waveform = READERS[name][1](film, [start])[0]
                    frame_counts.add(len(frames))
                    numbers = np.searchsorted(begins, SPEC.frame_times(start) + 1e-6, "right") - 1
                    for frame, number in zip(frames, numbers, strict=True):
                        near = range(max(0, number - 3), min(len(pictures), number + 4))
                        levels = {n: float(np.abs(frame.astype(np.int16) - pictures[n]).mean()) for n in near}
                        differences.append(levels[number])
                        wrong += min(levels.values()) < levels[number] - NEARER_LEVELS
                    if sound is not None:
                        heard.append(_sound_difference(waveform, *sound, start))
        except Exception as error:
            rows.append({"case": case.name, "reader": name, "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        row: dict[str, Any] = {
            "case": case.name,
            "reader": name,
            "frames_per_clip": sorted(frame_counts),
            "mean_levels": statistics.fmean(differences),
            "most_levels": max(differences),
            "wrong_frames": wrong / len(differences),
        }
        if heard:
            row |= {
                "sound_late_ms": statistics.median(h.late_ms for h in heard),
                "sound_late_ms_range": [min(h.late_ms for h in heard), max(h.late_ms for h in heard)],
                "sound_gain": statistics.median(h.gain for h in heard),
                "sound_error": statistics.median(h.error for h in heard),
            }
        rows.append(row)
    return rows


def _all_frames(film: Film) -> tuple[NDArray[np.float64], list[NDArray[np.int16]]]:
    """When each frame begins, from the first one on, and the frames as clips want them."""
    begins, pictures = [], []
    with av.open(str(film.picture)) as container:
        scaler = VideoReformatter()
        for frame in container.decode(video=0):
            begins.append(float(frame.pts * frame.time_base))
            pictures.append(_cut(_pyav_scaled(scaler, frame, film)[None])[0].astype(np.int16))
    return np.array(begins) - begins[0], pictures


def _all_sound(film: Film) -> tuple[NDArray[np.float32], int] | None:
    """The mean of the channels at the file's own rate, and that rate; sample 0 is at time 0."""
    if film.sound is None:
        return None
    with av.open(str(film.sound)) as container:
        rate = container.streams.audio[0].codec_context.sample_rate
        frames = list(container.decode(audio=0))
    parts = [frame.to_ndarray() for frame in frames]
    scale = 32_768.0 if parts[0].dtype == np.int16 else 1.0
    mono = np.concatenate([part.mean(0) for part in parts]).astype(np.float32) / np.float32(scale)
    first = round(float(frames[0].pts * frames[0].time_base) * rate)
    return np.concatenate([np.zeros(max(0, first), np.float32), mono[max(0, -first) :]]), rate


def _sound_difference(given: NDArray[np.float32], sound: NDArray[np.float32], rate: int, start: float) -> Heard:
    """How late it is, by how much too loud, and the share of it (root mean square) that is neither."""
    margin, first = rate // 10, round(start * rate)  # whole tenths of a second: whole samples at both rates
    padded = np.pad(sound, (margin, 2 * rate))[first : first + 2 * margin + round(SPEC.audio_seconds * rate)]
    whole = soxr.resample(padded, rate, SPEC.sample_rate_hz) if rate != SPEC.sample_rate_hz else padded
    wanted = whole[SPEC.sample_rate_hz // 10 :][: SPEC.sample_count]
    size = 2 * SPEC.sample_count
    lags = np.fft.irfft(np.fft.rfft(given, size) * np.conj(np.fft.rfft(wanted, size)))
    late = int(np.argmax(np.abs(lags)))
    late -= size if late >= SPEC.sample_count else 0
    if late > 0:
        given, wanted = given[late:], wanted[: len(wanted) - late]
    elif late < 0:
        given, wanted = given[:late], wanted[-late:]
    power = max(float(wanted @ wanted), 1e-9)
    gain = float(given @ wanted) / power
    rest = given / gain - wanted if gain else wanted
    return Heard(1000 * late / SPEC.sample_rate_hz, gain, float(np.sqrt(rest @ rest / power)))


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Our rate in units of each other reader's, and the packed file's in units of the raw one's."""
    rates = {(r["case"], r["reader"], r["clips_per_open"]): r.get("clips_per_second") for r in rows}
    ratios: dict[str, dict[str, float]] = {}
    for (case, reader, k), rate in rates.items():
        ours = rates.get((case, "cmacc", k))
        if reader != "cmacc" and rate and ours:
            ratios.setdefault(f"{case}, {k} an opening", {})[reader] = ours / rate
    for reader in dict.fromkeys(reader for _, reader, _ in rates):
        for k in (1, 4):
            raw, packed = rates.get(("raw", reader, k)), rates.get(("packed", reader, k))
            if raw and packed:
                ratios.setdefault(f"packed / raw, {k} an opening", {})[reader] = packed / raw
    return ratios


def machine() -> dict[str, Any]:
    """Processor, load and versions."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    ffmpeg = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "ffmpeg_of_pyav": ffmpeg,
    }
    if find_spec("torchcodec") is not None:
        from torchcodec._core import get_ffmpeg_library_versions

        found["ffmpeg_of_torchcodec"] = get_ffmpeg_library_versions()
    return found


@contextmanager
def _one_core() -> Iterator[None]:
    """One thread, on one core: a library that starts threads all the same shares it with them."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short made-up films, to see that it runs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clips", type=int, default=16, help="windows of a film; four times as many of the packed one")
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    rounds, clips = (1, 4) if options.quick else (options.rounds, options.clips)
    readers = [name for name, (needs, _) in READERS.items() if needs is None or find_spec(needs) is not None]
    with tempfile.TemporaryDirectory() as folder:
        cases, film = cases_of(Path(folder), options.quick, clips)
        compared = [row for case in cases for row in compare(case, readers, min(16, clips))]
        load = os.getloadavg()
        with _one_core():
            rows = measure(cases, readers, rounds)
    report = {
        "film": film,
        "clip": {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__},
        "rounds": rounds,
        "clips": {case.name: sum(map(len, case.starts)) for case in cases},
        "machine": machine() | {"load_before": load, "load_after": os.getloadavg()},
        "not_installed": [name for name in READERS if name not in readers],
        "rates": rows,
        "ratios": ratios_of(rows),
        "compared": compared,
    }
    _tell(report)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _tell(report: dict[str, Any]) -> None:
    rates = {(r["case"], r["reader"], r["clips_per_open"]): r for r in report["rates"]}
    print(f"{'clips per core-second, best (spread)':38}" + "".join(f"{name:>25}" for name in READERS))
    for case in report["clips"]:
        for k in (1, 4):
            cells = []
            for name in READERS:
                row = rates.get((case, name, k))
                if row is None:
                    cells.append("not installed")
                elif "failed" in row:
                    cells.append("failed")
                else:
                    cells.append(f"{row['clips_per_second']:.1f} (+{row['spread']:.0%})")
            print(f"{case + f', {k} an opening':38}" + "".join(f"{cell:>25}" for cell in cells))
    for row in report["compared"]:
        told = {n: f"{v:.3f}" if isinstance(v, float) else v for n, v in row.items() if n not in ("case", "reader")}
        print(f"{row['case']:24}{row['reader']:25}", *(f"{name} {value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
