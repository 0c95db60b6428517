"""Damaged copies of media files, to find out what decoding makes of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..conftest import Recipe, write_media

HEAD_BYTES = 2_048

# A file of about 10 kB of every container that a scan takes up; the damage is then seldom in coded pictures only.
SOURCES = {
    "mp4": Recipe(seconds=0.6, gop=5),
    "mp4 hevc": Recipe(seconds=0.4, video_codec="libx265", b_frames=3),
    "mp4 fragmented": Recipe(seconds=0.6, gop=5, mux_options=(("movflags", "frag_keyframe+empty_moov"),)),
    "mkv": Recipe(".mkv", seconds=0.6, gop=5, audio_codec="libopus", audio_rate_hz=48_000),
    "webm": Recipe(".webm", seconds=0.6, video_codec="libvpx", audio_codec="libopus", audio_rate_hz=48_000),
    "avi": Recipe(".avi", seconds=0.6, video_codec="mpeg4", audio_codec="libmp3lame"),
    "ts": Recipe(".ts", seconds=0.6, gop=5),
    "mpg": Recipe(".mpg", seconds=0.4, video_codec="mpeg2video", audio_codec="mp2", audio_rate_hz=48_000),
    "mov": Recipe(".mov", seconds=0.3, audio_codec="pcm_s16le", audio_rate_hz=8_000),
    "wav": Recipe(".wav", seconds=0.5, video_codec=None, audio_codec="pcm_s16le", audio_rate_hz=8_000),
    "wav float": Recipe(".wav", seconds=0.3, video_codec=None, audio_codec="pcm_f32le", audio_rate_hz=8_000),
    "avi mjpeg": Recipe(".avi", seconds=0.2, video_codec="mjpeg", audio_codec="pcm_u8", audio_rate_hz=11_025),
    "flac": Recipe(".flac", seconds=0.5, video_codec=None, audio_codec="flac", audio_rate_hz=16_000),
    "ogg": Recipe(".ogg", seconds=0.8, video_codec=None, audio_codec="libopus", audio_rate_hz=48_000),
    "mp3": Recipe(".mp3", seconds=0.8, video_codec=None, audio_codec="libmp3lame"),
    "m4a": Recipe(".m4a", seconds=0.8, video_codec=None),
}


def write_sources(folder: Path) -> list[Path]:
    """One whole small file of each kind in `SOURCES`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_media(recipe, folder / f"whole_{i}{recipe.suffix}") for i, recipe in enumerate(SOURCES.values())]


def mutants(seed: int, count: int, folder: Path, sources: Sequence[Path]) -> Iterator[Path]:
    """Write ``count`` damaged copies of the sources, one after the other; the same seed gives the same bytes.

    Each name tells the number and the kind of the damage. A file may be removed as soon as the next one is asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wholes = [np.frombuffer(path.read_bytes(), np.uint8) for path in sources]
    kinds = list(DAMAGES)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        source = number % len(sources)
        kind = kinds[int(rng.integers(len(kinds)))]
        data = wholes[source].copy()
        for _ in range(int(rng.choice([1, 1, 2, 4]))):
            if len(data) > 16:
                data = DAMAGES[kind](data, rng)
        path = folder / f"{number:06d}_{kind}{sources[source].suffix}"
        path.write_bytes(data.tobytes())
        yield path


def _flip(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    places = rng.integers(0, len(data), int(rng.choice([1, 10, 100])))
    data[places] = rng.integers(0, 256, len(places))
    return data


def _flip_in_head(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    places = rng.integers(0, min(HEAD_BYTES, len(data)), int(rng.choice([1, 4, 20])))
    data[places] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))], len(places))
    return data


def _flip_in_tail(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.asarray(_flip_in_head(data[::-1].copy(), rng)[::-1])  # where MP4 and AVI keep their tables


def _extreme_number(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A whole field, of two to eight bytes, with the largest or a very large number, in head or tail."""
    size = int(rng.choice([2, 4, 4, 8]))
    place = int(rng.integers(0, min(HEAD_BYTES, len(data) - size)))
    if rng.random() < 0.5:
        place = len(data) - size - place
    data[place : place + size] = rng.choice([0x00, 0x3F, 0x7F, 0xFF], 1) if rng.random() < 0.5 else rng.integers(256)
    return data


def _zero_block(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    begin, end = _block(data, rng)
    data[begin:end] = 0
    return data


def _double_block(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    begin, end = _block(data, rng)
    return np.concatenate([data[:end], data[begin:]])


def _remove_block(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    begin, end = _block(data, rng)
    return np.concatenate([data[:begin], data[end:]])


def _swap_blocks(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    (begin, end), middle = _block(data, rng), int(rng.integers(1, len(data)))
    middle = min(max(middle, begin), end)
    return np.concatenate([data[:begin], data[middle:end], data[begin:middle], data[end:]])


def _truncate(data: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return data[: int(rng.integers(0, len(data)))].copy()


def _block(data: NDArray[np.uint8], rng: np.random.Generator) -> tuple[int, int]:
    begin = int(rng.integers(0, len(data)))
    return begin, min(len(data), begin + int(2 ** rng.uniform(2, 12)))


DAMAGES = {
    "flipped": _flip,
    "head": _flip_in_head,
    "tail": _flip_in_tail,
    "extreme": _extreme_number,
    "zeroed": _zero_block,
    "doubled": _double_block,
    "removed": _remove_block,
    "swapped": _swap_blocks,
    "truncated": _truncate,
}
