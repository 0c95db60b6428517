"""Manifests for `evidence.sh` out of the real clips.

    python benchmarks/evidence_data.py ../shared/data/real OUT

``grid.parquet``: GRID, a quarter held out. ``sounding.parquet``: UCF101's three classes with sound, by its official
split 1, and the assorted clips, a quarter of them held out.
"""

import sys
from pathlib import Path

import pyarrow as pa

from cmacc.clips import LabelTable, Manifest, list_folders, scan

SOUNDING = ("BabyCrawling", "BodyWeightSquats", "BoxingPunchingBag")


def main(real: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    words = LabelTable(real / "grid" / "labels.csv", "command")
    scan(list_folders([real / "grid" / "clips"], words), test_fraction=0.25).manifest.write(out / "grid.parquet")
    table = LabelTable(real / "ucf101" / "manifest.csv", "label", "split1", "group", "file")
    ucf101 = scan(list_folders([real / "ucf101" / name for name in SOUNDING], table), min_seconds=0.5).manifest
    wild = scan(list_folders([real / "wild"]), test_fraction=0.25, min_seconds=0.5).manifest
    Manifest.of_table(pa.concat_tables([ucf101.table, wild.table])).write(out / "sounding.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
