"""Films in which picture and sound agree in some seconds only, in the layout of the data set AVE.

For each film, from (config, number) alone:

1. An event of the world, whose class is the label, and two others of other classes.
2. An interval of whole seconds, in which the event is seen and heard.
3. In the stretch before it and in that after it, one of three kinds of background: the event is seen, and another is
   heard; the event is heard, and another is seen; or one is seen, and another one heard.

So the class can be told from most of the seconds, and that it is an event only from picture and sound together.
Picture and sound are cut at whole seconds; sounds are faded over 20 ms, or clicks would tell where.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import written_aside
from cmacc.clips.synthetic.event import WorldConfig
from cmacc.clips.synthetic.world import describe_clip, mux, render_clip

SECONDS = 10
Background = Literal["other sound", "other picture", "neither"]
BACKGROUNDS: tuple[Background, ...] = ("other sound", "other picture", "neither")
# Beside the purposes of `event`: the interval of a film, and its backgrounds.
_INTERVAL = 7
_FADE_SECONDS = 0.02
# A film's own clips are three numbers. Where the classes of two are the same, another is looked for beyond all films.
_STEP = 3_000_000
_FULL_SHARE = 0.25
# Splits of ten films each: 7, 1 and 2 of them.
_SPLITS = {"train": range(7), "val": range(7, 8), "test": range(8, 10)}


class LocalisedFilm(NamedTuple):
    """What happens in a film: clips of the world by number, the event's interval, and what is around it."""

    name: str
    label: str
    event: int
    others: tuple[int, int]
    start_seconds: int
    end_seconds: int
    before: Background
    after: Background


def describe_film(config: WorldConfig, number: int) -> LocalisedFilm:
    """Draw a film; a pure function of its arguments.

    A quarter of the films are full, without any background; in AVE it is about two thirds.

    Raises
    ------
    ValueError
        ``number`` is negative.
    """
    event = describe_clip(config, 3 * number)
    others = [3 * number + 1, 3 * number + 2]
    for place in range(2):
        taken = {event.label, *(describe_clip(config, other).label for other in others[:place])}
        while config.class_count > place + 1 and describe_clip(config, others[place]).label in taken:
            others[place] += _STEP
    rng = np.random.default_rng([config.seed, number, _INTERVAL])
    length = SECONDS if rng.random() < _FULL_SHARE else int(rng.integers(2, SECONDS))
    start = int(rng.integers(0, SECONDS - length, endpoint=True))
    before, after = (BACKGROUNDS[kind] for kind in rng.integers(len(BACKGROUNDS), size=2))
    name = f"film_{number:06d}"
    return LocalisedFilm(name, event.label, 3 * number, (others[0], others[1]), start, start + length, before, after)


def render_film(config: WorldConfig, number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Frames ``(T, S, S, 3)`` and sound ``(samples, 2)`` of a film, as of `render_clip`; 10 s long."""
    film = describe_film(config, number)
    config = replace(config, duration_seconds=float(SECONDS))
    clips = {index: render_clip(config, index) for index in (film.event, *film.others)}
    first, second = film.others
    shown = {"other sound": film.event, "other picture": first, "neither": first}
    heard = {"other sound": first, "other picture": film.event, "neither": second}
    parts = [
        (0, film.start_seconds, shown[film.before], heard[film.before]),
        (film.start_seconds, film.end_seconds, film.event, film.event),
        (film.end_seconds, SECONDS, shown[film.after], heard[film.after]),
    ]
    frames = np.empty_like(clips[film.event][0])
    sound = np.zeros_like(clips[film.event][1])
    fade = round(_FADE_SECONDS * config.sample_rate_hz)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)[:, None]
    for begin, end, picture, source in parts:
        if begin == end:
            continue
        at = slice(begin * config.frame_rate_hz, end * config.frame_rate_hz)
        frames[at] = clips[picture][0][at]
        at = slice(begin * config.sample_rate_hz, end * config.sample_rate_hz)
        sound[at] = clips[source][1][at]
        sound[at.start : at.start + fade] *= ramp
        sound[at.stop - fade : at.stop] *= ramp[::-1]
    return frames, sound


def write_localised_world(
    config: WorldConfig, folder: str | Path, *, workers: int = 0, progress: Progress = silent
) -> Path:
    """Write ``clip_count`` films in the layout of AVE, and say what they show.

    The lines of ``Annotations.txt``, ``trainSet.txt``, ``valSet.txt`` and ``testSet.txt`` are
    ``class&film&quality&start&end``; the films are ``AVE/film_000123.mp4``. Existing films are kept, so that an
    interrupted run resumes; the lists are written last.

    Parameters
    ----------
    config
        The world. Its ``duration_seconds`` is not used: films are 10 s long.
    folder
        Where to write.
    workers
        Number of processes; 0 is one per core, 1 stays in this process. More are spawned, so a script needs the usual
        ``if __name__ == "__main__"``.
    progress
        Called with ("films", finished, all).

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        ``workers`` is negative, the world has fewer than 3 classes or copies of events, or the folder holds lists of
        other films.
    """
    if workers < 0:
        raise ValueError(f"write_localised_world: workers must be at least 0, got {workers}")
    if config.class_count < 3 or config.duplicate_share:
        raise ValueError(
            "write_localised_world: class_count must be at least 3 and duplicate_share 0, got "
            f"{config.class_count} and {config.duplicate_share}"
        )
    folder = Path(folder)
    films = [describe_film(config, number) for number in range(config.clip_count)]
    lines = [f"{film.label}&{film.name}&good&{film.start_seconds}&{film.end_seconds}\n" for film in films]
    text = {"Annotations.txt": "".join(lines)} | {
        f"{name}Set.txt": "".join(line for number, line in enumerate(lines) if number % SECONDS in members)
        for name, members in _SPLITS.items()
    }
    for name, content in text.items():
        if (folder / name).exists() and (folder / name).read_text() != content:
            raise ValueError(f"write_localised_world: folder must be new or hold the same films, got {folder}")
    write = partial(_write_missing, config, folder / "AVE")
    processes = min(workers or os.cpu_count() or 1, config.clip_count)
    if processes == 1:
        for number in range(config.clip_count):
            write(number)
            progress("films", number + 1, config.clip_count)
    else:  # spawn: forking a process that holds threads (torch, FFmpeg) can deadlock
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done, _ in enumerate(pool.map(write, range(config.clip_count), chunksize=4), 1):
                progress("films", done, config.clip_count)
    for name, content in text.items():
        with written_aside(folder / name) as aside:
            aside.write_text(content)
    return folder


def _write_missing(config: WorldConfig, folder: Path, number: int) -> None:
    """Write a film unless it exists. Top-level, for spawned workers."""
    path = folder / f"{describe_film(config, number).name}.mp4"
    if not path.exists():
        frames, sound = render_film(config, number)
        with written_aside(path) as aside:
            mux(frames, sound, aside, config)
