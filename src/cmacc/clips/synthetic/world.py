"""The synthetic world: an unlimited, seeded source of small .mp4 files in which visible events cause the audio.

A class is a (shape, motion, timbre) on a Latin square. Video (shape, motion) and audio (rhythm of the motion, timbre)
each determine the class, while no single part does. Size sets the pitch, contacts set the onsets, and the horizontal
position sets the stereo balance; these properties of the instance relate the two streams. Colours, background,
distractors and noise are independent of all of them.

Everything is a pure function of (config, index), so that any worker can make any clip, in any order. The price is that
a near-duplicate computes its original again. The modules: `event` (what happens), `motion` (where), `picture` and
`sound` (how it looks and sounds), and this one (the files).
"""

import csv
import io
import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from cmacc.clips.progress import Progress, silent
from cmacc.clips.synthetic.event import (
    CLASS,
    DUPLICATE,
    EVENT,
    MOTION,
    PITCH_RANGE_HZ,
    SIZE_RANGE,
    TIMBRE,
    Event,
    WorldConfig,
    class_parts,
    frame_seconds,
)
from cmacc.clips.synthetic.motion import trace
from cmacc.clips.synthetic.picture import draw
from cmacc.clips.synthetic.sound import sound_event, spoil

TABLE_COLUMNS = ("file", "label", "duplicate_of", "shape", "motion", "timbre", "size", "pitch_hz", "onset_seconds")


def describe_clip(config: WorldConfig, index: int) -> Event:
    """Draw the event of one clip; a pure function, independent of existing clips.

    Raises
    ------
    ValueError
        ``index`` is negative. Indices beyond ``clip_count`` are allowed.
    """
    if index < 0:
        raise ValueError(f"describe_clip: index must be at least 0, got {index}")
    origin = index
    while origin > 0:  # a copy of a copy is a copy of the original
        rng = np.random.default_rng([config.seed, origin, DUPLICATE])
        if rng.random() >= config.duplicate_share:
            break
        origin = int(rng.integers(origin))
    weights = np.arange(1, config.class_count + 1, dtype=float) ** -config.zipf_exponent
    edges = np.cumsum(weights / weights.sum())[:-1]
    class_index = int(np.searchsorted(edges, np.random.default_rng([config.seed, origin, CLASS]).random(), "right"))
    shape, motion, timbre = class_parts(class_index, config.class_count)
    size_draw, period_draw, phase, angle_draw = np.random.default_rng([config.seed, origin, EVENT]).random(4).tolist()
    event = Event(
        index=index,
        duplicate_of=origin if origin != index else None,
        class_index=class_index,
        label=f"{shape}_{motion}_{timbre}",
        shape=shape,
        motion=motion,
        timbre=timbre,
        size=SIZE_RANGE[0] * (SIZE_RANGE[1] / SIZE_RANGE[0]) ** size_draw,
        pitch_hz=PITCH_RANGE_HZ[1] * (PITCH_RANGE_HZ[0] / PITCH_RANGE_HZ[1]) ** size_draw,
        period_seconds=0.55 * (1.0 / 0.55) ** period_draw,  # at most 1 s, so that every clip has an onset
        phase=phase,
        base_angle_radians=2 * math.pi * angle_draw,
        motion_seed=(config.seed, origin, MOTION),
        timbre_seed=(config.seed, origin, TIMBRE),
        nuisance_seed=(config.seed, index),
    )
    track = trace(event, frame_seconds(config), config.duration_seconds)
    return replace(
        event,
        onset_seconds=tuple(track.onset_seconds.tolist()),
        onset_strengths=tuple(track.onset_strengths.tolist()),
        horizontal_path=tuple(track.x.tolist()),
    )


def render_clip(config: WorldConfig, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Render one clip in memory; a pure function.

    Returns
    -------
    frames : (T, S, S, 3) uint8
        RGB; frame i is at time i / frame_rate_hz.
    sound : (samples, 2) float32
        Left and right channel in -1..1; sample n is at time n / sample_rate_hz.
    """
    event = describe_clip(config, index)
    sound = sound_event(config, event)
    if config.nuisance:
        sound = spoil(sound, config, event)
    return draw(config, event), sound.astype(np.float32)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to ``path`` on success, so that a file of that name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def mux(frames: NDArray[np.uint8], sound: NDArray[np.float32], path: Path, config: WorldConfig) -> None:
    """Encode frames (T, S, S, 3) and sound (samples, 2) as H.264 and AAC into an .mp4 file.

    Frame i has pts i / frame_rate_hz. The AAC encoder starts 1,024 samples early. Its packets have negative pts, which
    the muxer turns into an edit list, and decoders drop this priming: sample 0 is at time 0.
    """
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=config.frame_rate_hz, options={"preset": "ultrafast", "crf": "20"})
        video.width, video.height, video.pix_fmt = config.frame_size, config.frame_size, "yuv420p"
        video.codec_context.thread_count = 1  # the workers already use all cores
        video.codec_context.time_base = Fraction(1, config.frame_rate_hz)
        audio = container.add_stream("aac", rate=config.sample_rate_hz, layout="stereo", bit_rate=96_000,
                                     options={"aac_coder": "fast"})  # fmt: skip
        audio.codec_context.thread_count = 1
        packets = []
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, config.frame_rate_hz)
            packets += video.encode(frame)
        samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout="stereo")
        samples.sample_rate, samples.pts = config.sample_rate_hz, 0
        samples.time_base = Fraction(1, config.sample_rate_hz)
        packets += video.encode(None) + audio.encode(samples) + audio.encode(None)
        # Interleaved by time, so that both streams of a window are close together in the file.
        container.mux(sorted(packets, key=lambda packet: (packet.dts or 0) * (packet.time_base or 0)))


def write_clip(config: WorldConfig, index: int, path: str | Path) -> None:
    """Render one clip and write it as .mp4, atomically."""
    frames, sound = render_clip(config, index)
    with _aside(Path(path)) as part:
        mux(frames, sound, part, config)


def _write_missing(config: WorldConfig, folder: Path, index: int) -> tuple[str, ...]:
    """Write clip ``index`` unless it exists, and return its row of world.csv. Top-level, for spawned workers."""
    event = describe_clip(config, index)
    file = f"{event.label}/clip_{index:06d}.mp4"
    if not (folder / file).exists():
        write_clip(config, index, folder / file)
    original = "" if event.duplicate_of is None else str(event.duplicate_of)
    facts = f"{event.size:.4f}", f"{event.pitch_hz:.2f}", " ".join(f"{onset:.4f}" for onset in event.onset_seconds)
    return file, event.label, original, event.shape, event.motion, event.timbre, *facts


def _settle(config: WorldConfig, folder: Path) -> WorldConfig:
    """Write world.json, or check the existing one, and return the config with the larger of the two counts."""
    note, wanted = folder / "world.json", asdict(config)
    found = json.loads(note.read_text()) if note.exists() else wanted
    differing = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
    if set(differing) - {"clip_count"}:
        raise ValueError(
            f"write_world: folder must be new or hold the world of the same config, got {folder} with another "
            f"{', '.join(f'{name} ({found.get(name)}, not {wanted.get(name)})' for name in differing)}"
        )
    config = replace(config, clip_count=max(config.clip_count, found.get("clip_count", 1)))
    if not note.exists() or asdict(config) != found:
        with _aside(note) as part:
            part.write_text(json.dumps(asdict(config), indent=2) + "\n")
    return config


def write_world(
    config: WorldConfig,
    folder: str | Path,
    *,
    workers: int = 0,
    progress: Progress = silent,
) -> Path:
    """Write all clips as folder/<label>/clip_000123.mp4, with world.json (the config) and world.csv (the events).

    Existing files of the same config are kept, so that an interrupted run resumes; world.csv is written last. Clips do
    not depend on ``clip_count``: a larger count adds clips to a folder, and a smaller one keeps the larger world.

    Parameters
    ----------
    config : WorldConfig
    folder : path
    workers : int
        Number of processes; 0 is one per core, 1 stays in this process. More are spawned, so a script needs the usual
        ``if __name__ == "__main__"``.
    progress : callable, optional
        Called with (finished clips, all clips) after each clip.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        Where the folder holds the world of a config that differs in more than its count, or ``workers`` is negative.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as place:
    ...     world = write_world(WorldConfig(clip_count=1), Path(place) / "world", workers=1)
    ...     sorted(path.name for path in world.iterdir() if path.is_file())
    ['world.csv', 'world.json']
    """
    if workers < 0:
        raise ValueError(f"write_world: workers must be at least 0, got {workers}")
    folder = Path(folder)
    config = _settle(config, folder)
    write = partial(_write_missing, config, folder)
    processes = min(workers or os.cpu_count() or 1, config.clip_count)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(TABLE_COLUMNS)

    def collect(made: Iterator[tuple[str, ...]]) -> None:
        for done, row in enumerate(made, 1):
            rows.writerow(row)
            progress("clips", done, config.clip_count)

    if processes == 1:
        collect(map(write, range(config.clip_count)))
    else:  # spawn: forking a process that holds threads (torch, FFmpeg) can deadlock
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            collect(pool.map(write, range(config.clip_count), chunksize=4))
    with _aside(folder / "world.csv") as part:
        part.write_text(table.getvalue())
    return folder
