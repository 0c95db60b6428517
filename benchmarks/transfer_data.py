"""Manifests for `transfer.sh` out of the real clips: what is trained on, and what is held out.

    python benchmarks/transfer_data.py ../shared/data/real OUT

Trained on are GRID's training clips, the training files of UCF101's split 1 in its three classes with sound, all the
assorted clips, and 640 clips of the synthetic world. None of ESC-50 is, and nothing that any task here holds out.
"""

import sys
from pathlib import Path

import pyarrow as pa

from cmacc.clips import LabelTable, Listing, Manifest, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world

SOUNDING = ("BabyCrawling", "BodyWeightSquats", "BoxingPunchingBag")


def main(real: Path, out: Path) -> None:
    """Write ``grid-digit``, ``grid-color``, ``ucf101-sounding`` and ``pretrain`` ``.parquet`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)

    def written(name: str, listing: Listing, test_fraction: float = 0.0) -> Manifest:
        # As `cmacc scan` does by default, which leaves one clip out.
        scanned = scan(listing, test_fraction=test_fraction, min_seconds=0.5, journal=out / f"{name}.scan")
        manifest = scanned.manifest
        manifest.write(out / f"{name}.parquet")
        print(f"{name}: {len(manifest)} files, {manifest.column('split').count('test')} held out")
        return manifest

    grid = real / "grid"
    digit, _ = (
        written(f"grid-{word}", list_folders([grid / "clips"], LabelTable(grid / "labels.csv", word)), 0.25)
        for word in ("digit", "color")
    )
    ucf101 = real / "ucf101"
    table = LabelTable(ucf101 / "manifest.csv", "label", "split1", "group", "file")
    sounding = written("ucf101-sounding", list_folders([ucf101 / name for name in SOUNDING], table))
    wild = written("wild", list_folders([real / "wild"]))
    write_world(WorldConfig(clip_count=640, class_count=32, nuisance=0.3, frame_size=64, seed=0), out / "world")
    world = written("world", list_folders([out / "world"]))
    joined = pa.concat_tables([manifest.table for manifest in (digit, sounding, wild, world)])
    Manifest.of_table(joined).write(out / "pretrain.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
