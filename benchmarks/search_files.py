"""Search in an index of real files: time and size of the index, and whether sounds find their videos.

    OMP_NUM_THREADS=1 python benchmarks/search_files.py RUN OUT.json --data grid=grid.parquet wild=wild.parquet

All files of the manifests with picture and sound (of split ``test``, if there are any) go into one index, embedded on
one core. Then, for each manifest:

* ``sound_to_video``, ``video_to_sound``: every file is a query by its sound alone, searched for in pictures, and the
  other way round. R@1 and R@10 of its own file among the files that are found (a moment each), with chance.
* ``found``: share of these queries that find anything at a false-alarm rate of 1 %, and of those, the share whose first
  moment is of their own file.
* ``absent``: the index of every second file, searched with the sounds (pictures) of the other files: how many find
  something, beside the 95 % interval of a binomial with 1 %. Like may be found there as well: the files that are
  searched with may be of the same kind as files in the index.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.stats import binom

from cmacc.clips import Manifest, MediaRecord
from cmacc.encoders import MODALITIES, Modality
from cmacc.search import Answer, Index, SearchError, embed_files

RATE = 0.01


def held_out(manifest: Manifest) -> Manifest:
    """Files with picture and sound, of split test if there are any."""
    records = [record for record in manifest.records if record.has_picture and record.has_audio]
    return Manifest([record for record in records if record.split == "test"] or records)


def searched(index: Index, record: MediaRecord, by: Modality, **options: Any) -> Answer | None:
    """The answer; None for a file whose sound is silent."""
    try:
        return index.search(record.path, by=by, **options)
    except SearchError as error:
        if "silent" not in str(error):
            raise
        return None


def ranks(index: Index, manifest: Manifest, by: Modality, into: Modality) -> list[int]:
    """Rank of the own file of every query; 11 if it is not among ten moments of different files."""
    found = []
    for record in manifest.records:
        answer = searched(index, record, by, into=into, top=200, false_alarm_rate=1.0)
        if answer is None:
            continue
        paths = list(dict.fromkeys(moment.path for moment in answer.moments))[:10]
        own = str(Path(record.path).resolve())
        found.append(1 + paths.index(own) if own in paths else 11)
    return found


def directions(index: Index, manifest: Manifest) -> dict[str, Any]:
    """R@1 and R@10 in both directions, and what is found at 1 %."""
    report: dict[str, Any] = {}
    files = len(index.rows("video").first) - 1
    for by, into, name in (("audio", "video", "sound_to_video"), ("video", "audio", "video_to_sound")):
        own = np.array(ranks(index, manifest, by, into))
        answers = [searched(index, record, by, into=into, false_alarm_rate=RATE) for record in manifest.records]
        right = [
            answer.moments[0].path == str(Path(record.path).resolve())
            for answer, record in zip(answers, manifest.records, strict=True)
            if answer is not None and answer.moments
        ]
        report[name] = {
            "queries": len(own),
            "files": files,
            "R@1": float((own <= 1).mean()),
            "R@10": float((own <= 10).mean()),
            "chance_R@1": 1 / files,
            "chance_R@10": 10 / files,
            "found": len(right) / len(own),
            "right_of_found": float(np.mean(right)) if right else None,
        }
    return report


def absent(run: str, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """False alarms of searches for what is not there."""
    records = list(manifest.records)
    embed_files(run, Manifest(records[::2]), folder)
    index = Index.open(folder)
    report: dict[str, Any] = {}
    modalities = [m for m in MODALITIES if (records[0].has_picture if m == "video" else records[0].has_audio)]
    for by in modalities:
        for into in modalities:
            answers = [searched(index, record, by, into=into, false_alarm_rate=RATE) for record in records[1::2]]
            asked = [answer for answer in answers if answer is not None]
            alarms = sum(bool(answer.moments) for answer in asked)
            low, high = binom.interval(0.95, len(asked), RATE)
            report[f"{by}_in_{into}"] = {
                "searches": len(asked), "alarms": alarms, "interval": [int(low), int(high)]
            }  # fmt: skip
    return report


def main() -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run or export folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=MANIFEST")
    parser.add_argument("--absent", nargs="+", default=[], metavar="NAME=MANIFEST", help="for ``absent`` alone")
    options = parser.parse_args()
    sets = {name: held_out(Manifest.read(path)) for name, _, path in (text.partition("=") for text in options.data)}
    together = Manifest([record for manifest in sets.values() for record in manifest.records])
    report: dict[str, Any] = {"run": options.run, "processor": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as name:
        began, spent = time.perf_counter(), time.process_time()
        result = embed_files(options.run, together, Path(name) / "index")
        hours = result.seconds_embedded / 3600
        report["index"] = {
            "files": result.added,
            "hours": hours,
            "rows": result.row_count,
            "bytes_per_hour": result.disk_bytes / hours,
            "hours_per_core_hour": result.seconds_embedded / (time.process_time() - spent),
            "wall_seconds": time.perf_counter() - began,
        }
        index = Index.open(Path(name) / "index")
        for place, (kind, manifest) in enumerate(sets.items()):
            report[kind] = directions(index, manifest) | {
                "absent": absent(options.run, manifest, Path(name) / f"absent-{place}")
            }
            print(json.dumps({kind: report[kind]}), flush=True)
        for place, text in enumerate(options.absent):
            kind, _, path = text.partition("=")
            report[kind] = {"absent": absent(options.run, Manifest.read(path), Path(name) / f"alone-{place}")}
            print(json.dumps({kind: report[kind]}), flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["index"]))


if __name__ == "__main__":
    main()
