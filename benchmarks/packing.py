"""From a folder of 10-second films to shards: seconds and bytes a film, and what that makes for the large data sets.

``python benchmarks/packing.py --out benchmarks/results/packing-cpu.json``: three minutes on two cores. The films are
made of real UCF101 clips (``../shared/data``) at 340 x 256, 30 frames per second, H.264 (crf 23, a keyframe every 250
frames) with 10 s of ESC-50's sounds in AAC, which is about what Kinetics, VGGSound and AudioSet look like on disk.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from cmacc.clips import ClipSpec, Manifest, PackSettings, decode_clip, list_folders, pack, scan, verify

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"
SECONDS, FPS, WIDTH, HEIGHT, RATE_HZ = 10, 30, 340, 256, 44_100
# Clips in the lists as published: Kay et al. 2017, Chen et al. 2020, Gemmeke et al. 2017; each lasts 10 s.
DATA_SETS = {"Kinetics-400": 306_245, "VGGSound": 199_176, "AudioSet": 2_084_320}


def frames_of(films: list[Path]) -> Iterator[NDArray[np.uint8]]:
    for film in films:
        with av.open(str(film)) as container:
            for frame in container.decode(video=0):
                yield frame.reformat(WIDTH, HEIGHT, "rgb24").to_ndarray()


def write_film(path: Path, pictures: Iterator[NDArray[np.uint8]], sound: NDArray[np.float32]) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.codec_context.options = {"preset": "fast", "crf": "23", "x264-params": "keyint=250"}
        audio = container.add_stream("aac", rate=RATE_HZ, layout="stereo")
        audio.codec_context.bit_rate = 128_000
        for number in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(next(pictures), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(np.stack([sound, 0.9 * sound]), format="fltp", layout="stereo")
        samples.sample_rate = RATE_HZ
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))


def make_films(folder: Path, count: int) -> None:
    if REAL.is_dir():
        clips = sorted(REAL.joinpath("ucf101").rglob("*.mp4"))
        sounds = sorted(REAL.joinpath("esc50", "audio").glob("*.ogg"))
        pictures = frames_of([clips[i * 7 % len(clips)] for i in range(6 * count)])
        spec = ClipSpec(1, 1.0, 16, 16, SECONDS / 2, RATE_HZ)
        for number in range(count):
            halves = [decode_clip(sounds[(2 * number + i) * 7 % len(sounds)], 0.0, spec).waveform for i in range(2)]
            write_film(folder / f"{number:04d}.mp4", pictures, np.concatenate(halves))
        return
    rng = np.random.default_rng(0)
    drift = rng.integers(0, 255, (HEIGHT, 2 * WIDTH, 3), dtype=np.uint8)
    for number in range(count):
        pictures = (np.ascontiguousarray(drift[:, i % WIDTH : i % WIDTH + WIDTH]) for i in range(SECONDS * FPS))
        write_film(folder / f"{number:04d}.mp4", pictures, rng.normal(0, 0.1, SECONDS * RATE_HZ).astype(np.float32))


def clips_per_second(manifest: Manifest, count: int) -> float:
    """Random default clips on one core."""
    rng, spec, records = np.random.default_rng(0), ClipSpec(), list(manifest.records)
    decode_clip(records[0].source, 0.0, spec)
    begun = time.perf_counter()
    for _ in range(count):
        decode_clip(records[rng.integers(len(records))].source, float(rng.uniform(0, SECONDS - 2)), spec)
    return count / (time.perf_counter() - begun)


def measure(films: int, workers: int, clips: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as executor:
        folder = Path(name)
        (folder / "films").mkdir()
        make_films(folder / "films", films)
        list(executor.map(lambda _: scan(list_folders([folder / "films"])), range(1)))  # starts the helper process
        begun = time.perf_counter()
        manifest = scan(list_folders([folder / "films"]), executor=executor).manifest
        scan_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        pack(manifest, folder / "packed", PackSettings(samples_per_shard=max(1, films // 8)), executor=executor)
        pack_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        assert verify(folder / "packed") == []
        verify_seconds = time.perf_counter() - begun
        index = Manifest.read(folder / "packed" / "index.parquet")
        video_bytes, audio_bytes = (sum(index.column(f"{kind}_size")) for kind in ("video", "audio"))
        return {
            "films": films,
            "workers": workers,
            "raw_bytes_per_film": sum(p.stat().st_size for p in (folder / "films").iterdir()) / films,
            "packed_bytes_per_film": sum(p.stat().st_size for p in (folder / "packed").iterdir()) / films,
            "packed_video_bytes_per_film": video_bytes / films,
            "packed_audio_bytes_per_film": audio_bytes / films,
            "scan_core_seconds_per_film": scan_seconds * workers / films,
            "pack_core_seconds_per_film": pack_seconds * workers / films,
            "verify_seconds_per_gigabyte": verify_seconds / (video_bytes + audio_bytes) * 1e9,
            "raw_clips_per_second_per_core": clips_per_second(manifest, clips),
            "packed_clips_per_second_per_core": clips_per_second(index, clips),
        }


def estimates(measured: dict[str, Any], cores: int) -> list[dict[str, Any]]:
    """What the measured rates make for whole data sets, on so many cores, if the disks keep up."""
    return [
        {
            "data_set": name,
            "clips": clips,
            "raw_gigabytes": clips * measured["raw_bytes_per_film"] / 1e9,
            "packed_gigabytes": clips * measured["packed_bytes_per_film"] / 1e9,
            "scan_hours": clips * measured["scan_core_seconds_per_film"] / cores / 3600,
            "pack_hours": clips * measured["pack_core_seconds_per_film"] / cores / 3600,
            "raw_epoch_hours": clips / measured["raw_clips_per_second_per_core"] / cores / 3600,
            "packed_epoch_hours": clips / measured["packed_clips_per_second_per_core"] / cores / 3600,
        }
        for name, clips in DATA_SETS.items()
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clips", type=int, default=300, help="random clips read, raw and packed")
    parser.add_argument("--cores", type=int, default=32, help="of the machine that the estimates are for")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    measured = measure(options.films, options.workers, options.clips)
    report = {
        "films_are": "real" if REAL.is_dir() else "noise",
        "load_before": load,
        "cores": options.cores,
        "measured": measured,
        "estimates": estimates(measured, options.cores),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return report


if __name__ == "__main__":
    main()
