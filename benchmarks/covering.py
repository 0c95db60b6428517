"""What it costs to read whole files as overlapping windows: each on its own, and as `covering_loader` reads them.

Windows of 2 s, one every second, as the default `ClipSpec` has them: 16 frames of 112 x 112 and sound at 16 kHz.

* ``alone``: `decode_clip` for each window, which opens the file each time.
* ``together``: `covering_loader` without workers, at most 32 windows a batch.

Both take turns; the least processor time of the rounds counts, as seconds of one core for each hour of the files. Of
the sound, the largest difference between the two is told, for files whose decoder adds no noise.

The files: GRID's where they are on the machine (``../shared/data/real/grid/clips``), and 10 minutes of a made-up moving
picture with sound (``.mp4``), and of sound alone (``.ogg``, Vorbis, which is read from its start at each opening).

``python benchmarks/covering.py --out benchmarks/results/covering-cpu.json``: about ten minutes on a CPU.
"""

import os

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from decoding import SOUND_RATE, made_up_film, write_film

from cmacc.clips import ClipSpec, CoveringPlan, Manifest, MediaRecord, covering_loader, decode_clip, probe

GRID = Path(__file__).resolve().parents[2] / "shared" / "data" / "real" / "grid" / "clips"
SPEC = ClipSpec()
HOP_SECONDS, BATCH_SIZE = 1.0, 32


def write_vorbis(path: Path, sound: NDArray[np.float32]) -> Path:
    """Stereo sound (2, samples) by FFmpeg's own encoder, which every build has."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("vorbis", rate=SOUND_RATE, layout="stereo")
        stream.codec_context.options = {"strict": "-2"}
        for first in range(0, sound.shape[1], SOUND_RATE):
            chunk = np.ascontiguousarray(sound[:, first : first + SOUND_RATE])
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, first, Fraction(1, SOUND_RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def manifest_of(paths: list[Path]) -> Manifest:
    infos = [probe(path) for path in paths]
    return Manifest(
        MediaRecord(p, i.duration_seconds, i.fps, i.width, i.height, i.has_audio, i.audio_rate_hz, "a")
        for p, i in zip(paths, infos, strict=True)
    )


def plan_of(manifest: Manifest) -> CoveringPlan:
    return CoveringPlan(manifest, range(len(manifest)), SPEC.length_seconds, HOP_SECONDS, BATCH_SIZE)


def read_alone(manifest: Manifest) -> list[NDArray[np.float32]]:
    """The sound of every window."""
    paths = [record.path for record in manifest.records]
    requests = [request for batch in plan_of(manifest) for request in batch]
    return [decode_clip(paths[r.sample_id], r.start_seconds, SPEC).waveform.numpy() for r in requests]


def read_together(manifest: Manifest) -> list[NDArray[np.float32]]:
    """The sound of every window."""
    loader = covering_loader(plan_of(manifest), SPEC, workers=0)
    return [waveform for batch in loader for waveform in batch.waveforms.numpy()]


READERS: dict[str, Callable[[Manifest], list[NDArray[np.float32]]]] = {"alone": read_alone, "together": read_together}


def measure(name: str, paths: list[Path], rounds: int) -> dict[str, Any]:
    manifest = manifest_of(paths)
    hours = sum(record.duration_seconds for record in manifest.records) / 3600
    seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
    heard = {}
    for _ in range(rounds):
        for reader, read in READERS.items():
            began = time.process_time()
            heard[reader] = read(manifest)
            seconds[reader].append((time.process_time() - began) / hours)
    differences = [np.abs(a - b).max() for a, b in zip(heard["alone"], heard["together"], strict=True)]
    return {
        "files": name,
        "count": len(paths),
        "minutes": 60 * hours,
        "windows": len(differences),
        "core_seconds_per_hour": {reader: min(rows) for reader, rows in seconds.items()},
        "spread": {reader: max(rows) / min(rows) - 1 for reader, rows in seconds.items()},
        "alone_of_together": min(seconds["alone"]) / min(seconds["together"]),
        "largest_difference_of_sound": float(max(differences)),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short files, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    seconds, repeats, rounds = (2.0, 3, 1) if options.quick else (20.0, 30, options.rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            frames, sound = made_up_film(seconds, 240, 320)
            long_sound = np.tile(sound, repeats)
            cases = {
                "GRID": sorted(GRID.glob("*.mp4"))[: 2 if options.quick else 100],
                "mp4": [write_film(folder / "long.mp4", frames * repeats, long_sound, 250)],
                "ogg": [write_vorbis(folder / "long.ogg", long_sound)],
            }
            rows = []
            for case, paths in cases.items():
                if paths:
                    rows.append(measure(case, paths, rounds))
                    print(json.dumps(rows[-1]), flush=True)
    finally:
        torch.set_num_threads(threads)
    report = {
        "window_seconds": SPEC.length_seconds,
        "hop_seconds": HOP_SECONDS,
        "rounds": rounds,
        "rows": rows,
        "python": platform.python_version(),
        "av": av.__version__,
        "cores": os.cpu_count(),
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
