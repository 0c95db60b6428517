"""Manifests for `transfer.sh` out of the real clips: what is trained on, and what is held out.

    python benchmarks/transfer_data.py ../shared/data/real OUT
    python benchmarks/transfer_data.py ../shared/data/real OUT alone    # only those for one modality

Trained on are GRID's training clips, the training files of UCF101's split 1 in its three classes with sound, all the
assorted clips, and 640 clips of the synthetic world. None of ESC-50 is, and nothing that any task here holds out.

For one modality alone: ``sounds`` are the clips of ESC-50's fold 4 in the 40 classes that are not ESC-10's, less those
cut from a recording of which ESC-10 has a part, UCF101's training files of split 1 with sound, and the assorted clips;
``pictures`` are UCF101's training files of split 1 in all its classes, silent or not.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import pyarrow as pa

from cmacc.clips import LabelTable, Listing, Manifest, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world

SOUNDING = ("BabyCrawling", "BodyWeightSquats", "BoxingPunchingBag")
ALL = (*SOUNDING, "JumpingJack", "Punch", "PushUps")


def written(out: Path, name: str, listing: Listing, test_fraction: float = 0.0) -> Manifest:
    """Scan as `cmacc scan` does by default, which refuses one clip, and write ``out/name.parquet``."""
    out.mkdir(parents=True, exist_ok=True)
    scanned = scan(listing, test_fraction=test_fraction, min_seconds=0.5, journal=out / f"{name}.scan")
    manifest = scanned.manifest
    manifest.write(out / f"{name}.parquet")
    print(f"{name}: {len(manifest)} files, {manifest.column('split').count('test')} held out")
    return manifest


def ucf101_listing(real: Path, classes: tuple[str, ...]) -> Listing:
    """UCF101's files of some classes, with split 1."""
    table = LabelTable(real / "ucf101" / "manifest.csv", "label", "split1", "group", "file")
    return list_folders([real / "ucf101" / name for name in classes], table)


def other_sounds(real: Path) -> Listing:
    """ESC-50's fold 4 without ESC-10's classes and recordings."""
    with (real / "esc50" / "available.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    recordings = {row["src_file"] for row in rows if row["esc10"] == "True"}
    names = {
        row["file"]
        for row in rows
        if row["fold"] == "4" and row["esc10"] == "False" and row["src_file"] not in recordings
    }
    listing = list_folders([real / "esc50" / "audio"])
    return dataclasses.replace(listing, files=tuple(file for file in listing.files if file.path.name in names))


def one_modality(real: Path, out: Path) -> None:
    """Write ``sounds`` and ``pictures`` ``.parquet`` into ``out``."""
    pictures = written(out, "pictures", ucf101_listing(real, ALL))
    parts = [
        written(out, "other-sounds", other_sounds(real)),
        written(out, "ucf101-sounding", ucf101_listing(real, SOUNDING)),
        written(out, "wild", list_folders([real / "wild"])),
    ]
    sounds = Manifest.of_table(pa.concat_tables([manifest.table for manifest in parts]))
    sounds.write(out / "sounds.parquet")
    for name, manifest in (("sounds", sounds), ("pictures", pictures)):
        print(f"{name}: {len(manifest) - manifest.column('split').count('test')} files to train on")


def main(real: Path, out: Path) -> None:
    """Write ``grid-digit``, ``grid-color``, ``ucf101-sounding`` and ``pretrain`` ``.parquet`` into ``out``."""
    grid = real / "grid"
    digit, _ = (
        written(out, f"grid-{word}", list_folders([grid / "clips"], LabelTable(grid / "labels.csv", word)), 0.25)
        for word in ("digit", "color")
    )
    sounding = written(out, "ucf101-sounding", ucf101_listing(real, SOUNDING))
    wild = written(out, "wild", list_folders([real / "wild"]))
    write_world(WorldConfig(clip_count=640, class_count=32, nuisance=0.3, frame_size=64, seed=0), out / "world")
    world = written(out, "world", list_folders([out / "world"]))
    joined = pa.concat_tables([manifest.table for manifest in (digit, sounding, wild, world)])
    Manifest.of_table(joined).write(out / "pretrain.parquet")


if __name__ == "__main__":
    (one_modality if sys.argv[3:] == ["alone"] else main)(Path(sys.argv[1]), Path(sys.argv[2]))
