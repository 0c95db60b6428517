"""Notes on disk: TinySOL's table and folds, its names, class folders; half a set is refused."""

import csv
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmacc.clips import Listing, ListingError, Manifest, MediaRecord, ScanResult
from cmacc.heads.instrument_files import TINYSOL_TABLE, instrument_of, instruments_task
from cmacc.heads.instrument_ontology import TINYSOL_CLASSES
from cmacc.transfer import TaskError, official

# Family, name in full, folder and abbreviation as in the published table, with the number of notes.
TINYSOL = (
    ("Keyboards", "Accordion", "Acc", 689), ("Strings", "Viola", "Va", 309), ("Strings", "Contrabass", "Cb", 309),
    ("Strings", "Violoncello", "Vc", 291), ("Strings", "Violin", "Vn", 284), ("Brass", "French Horn", "Hn", 134),
    ("Winds", "Clarinet in B-flat", "ClBb", 126), ("Winds", "Bassoon", "Bn", 126), ("Winds", "Flute", "Fl", 118),
    ("Brass", "Trombone", "Tbn", 117), ("Brass", "Bass Tuba", "BTb", 108), ("Winds", "Oboe", "Ob", 107),
    ("Winds", "Alto Saxophone", "ASax", 99), ("Brass", "Trumpet in C", "TpC", 96),
)  # fmt: skip


@pytest.fixture
def no_files_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def scanned(listing: Listing, **_: Any) -> ScanResult:
        records = [
            MediaRecord(f.path, 3.0, 0.0, 0, 0, True, 44_100, f.label, f.split, f.group, content_hash=str(f.path))
            for f in listing.files
        ]
        return ScanResult(Manifest(records), {}, {}, listing)

    monkeypatch.setattr(official, "scan", scanned)


def tinysol_rows() -> list[dict[str, str]]:
    rows = []
    for family, name, short, count in TINYSOL:
        for i in range(count):
            pitch = f"{'CDEFGAB'[i % 7]}{'#' if i % 2 else ''}{i // 7 % 9}"
            path = f"{family}/{name.replace(' ', '_')}/ordinario/{short}-ord-{pitch}-mf-{i}c-N.wav"
            rows.append({"Path": path, "Fold": str(i % 5), "Family": family, "Instrument (abbr.)": short})
            rows[-1] |= {"Instrument (in full)": name, "Technique (abbr.)": "ord", "Pitch": pitch}
    return rows


def written(folder: Path, rows: list[dict[str, str]], *, below: str = "TinySOL", name: str = TINYSOL_TABLE) -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        path = folder / below / row["Path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("name", "instrument"),
    [
        ("Strings/Violin/ordinario/Vn-ord-A3-mf-4c-N.wav", "violin"),
        ("Acc-ord-A1-ff-N-T22u.wav", "accordion"),
        ("BTb-ord-C#2-pp-N-T25u_R100u.wav", "bass tuba"),
    ],
)
def test_names_of_notes(name: str, instrument: str) -> None:
    assert instrument_of(name) == instrument
    with pytest.raises(TaskError, match=r"name must be INSTRUMENT-TECHNIQUE-.* such as Vn-ord-A3-mf-4c-N, got 'Vn_A3'"):
        instrument_of("Vn_A3.wav")
    with pytest.raises(TaskError, match=r"instrument must be one of ASax, Acc, .*, got 'Gtr'"):
        instrument_of("Gtr-ord-A3-mf-4c-N.wav")


@pytest.mark.usefixtures("no_files_opened")
def test_tinysol_is_held_out_by_its_folds(tmp_path: Path) -> None:
    rows = tinysol_rows()
    root = written(tmp_path, rows)
    data = instruments_task(root)
    assert data.task == "instruments"
    assert (data.facts.files, data.facts.classes, data.facts.is_partial) == (2_913, 14, False)
    assert data.manifest.classes() == list(TINYSOL_CLASSES)
    assert [split.name for split in data.splits] == [f"fold {i}" for i in range(5)]
    names = [Path(path).name for path in data.manifest.column("path")]
    for number, split in enumerate(data.splits):
        assert sorted(names[i] for i in split.test) == sorted(
            Path(row["Path"]).name for row in rows if row["Fold"] == str(number)
        )
        assert sorted((*split.train, *split.test)) == list(range(2_913))
    (root / "TinySOL" / rows[0]["Path"]).unlink()
    with pytest.raises(TaskError, match=r"must hold all 2,913 files of 14 classes, got 2,912 .*Acc-ord-C0-mf-0c-N.wav"):
        instruments_task(root)
    partial = instruments_task(root, allow_partial=True)
    assert (partial.facts.files, partial.facts.files_listed) == (2_912, 2_913)
    assert partial.skipped == {rows[0]["Path"]: "is missing"}


@pytest.mark.usefixtures("no_files_opened")
def test_another_table_wants_its_own_rows(tmp_path: Path) -> None:
    rows = [row for row in tinysol_rows() if int(row["Path"].rsplit("-", 2)[1][:-1]) < 10]
    root = written(tmp_path, rows, name="notes.csv")
    data = instruments_task(root, table=root / "notes.csv")
    assert (data.facts.files, data.facts.files_listed, data.facts.is_partial) == (140, 140, False)
    drawn = instruments_task(root, table=root / "notes.csv", folds=2)
    assert [split.name for split in drawn.splits] == ["fold 1", "fold 2"]
    (root / "TinySOL" / "stray.wav").touch()
    stray = instruments_task(root, table=root / "notes.csv")
    assert list(stray.skipped.values()) == ["has no instrument in notes.csv"]
    (root / "TinySOL" / rows[3]["Path"]).unlink()
    with pytest.raises(TaskError, match=r"must hold all 140 files of 14 classes, got 139"):
        instruments_task(root, table=root / "notes.csv")
    written(tmp_path, [row | {"Fold": "x"} for row in rows], name="bad.csv")
    with pytest.raises(TaskError, match=r"bad.csv: Fold of .* must be a number, got 'x'"):
        instruments_task(root, table=root / "bad.csv")
    written(tmp_path, [row | {"Fold": "1"} for row in rows], name="one.csv")
    with pytest.raises(TaskError, match=r"one.csv: must have at least 2 folds with files in .*, got 1"):
        instruments_task(root, table=root / "one.csv")
    written(tmp_path, [{"Path": row["Path"]} for row in rows], name="lacks.csv")
    with pytest.raises(ListingError, match=r"no column 'Instrument \(in full\)'"):
        instruments_task(root, table=root / "lacks.csv")


@pytest.mark.usefixtures("no_files_opened")
def test_names_without_a_table(tmp_path: Path) -> None:
    rows = [row for row in tinysol_rows() if int(row["Path"].rsplit("-", 2)[1][:-1]) < 10]
    root = written(tmp_path, rows)
    (root / TINYSOL_TABLE).unlink()
    (root / "readme.wav").touch()
    with pytest.raises(
        TaskError, match=r"must hold all 2,913 files of 14 classes, got 140 files of 14 classes \(readme"
    ):
        instruments_task(root)
    data = instruments_task(root, allow_partial=True)
    assert Counter(data.class_of.tolist()) == dict.fromkeys(range(14), 10)
    assert len(data.splits) == 5
    assert all(set(Counter(data.class_of[list(split.test)].tolist()).values()) == {2} for split in data.splits)


@pytest.mark.usefixtures("no_files_opened")
def test_class_folders(tmp_path: Path) -> None:
    for folder in ("Violoncello", "Glass_Harp", "tuba"):
        for i in range(6):
            path = tmp_path / folder / f"{i}.wav"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (tmp_path / "stray.wav").touch()
    data = instruments_task(tmp_path, folds=3)
    assert data.manifest.classes() == ["bass tuba", "cello", "glass harp"]
    assert (len(data.splits), data.facts.files, data.facts.is_partial) == (3, 18, False)
    assert list(data.skipped.values()) == ["stands in no class folder"]
    flat = tmp_path / "Glass_Harp"
    with pytest.raises(TaskError, match=r"must hold TinySOL_metadata.csv, files named .*, or at least 2 class folders"):
        instruments_task(flat)


def test_real_notes(tmp_path: Path) -> None:
    """Files that are opened: one of them is damaged, and is told."""
    for folder, hertz in (("violin", 600), ("tuba", 80)):
        for i in range(4):
            path = tmp_path / folder / f"{i}.wav"
            path.parent.mkdir(exist_ok=True)
            tone = np.sin(2 * np.pi * (hertz + 10 * i) * np.arange(3_200) / 16_000)
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes((8_000 * tone).astype("<i2").tobytes())
    (tmp_path / "violin" / "3.wav").write_bytes(b"RIFF, but no more")
    with pytest.raises(TaskError, match=r"must hold all 8 files of 2 classes, got 7 files of 2 classes \(3.wav: "):
        instruments_task(tmp_path, folds=2, journal=tmp_path / "journal")
    data = instruments_task(tmp_path, folds=2, journal=tmp_path / "journal", allow_partial=True)
    assert (data.facts.files, data.facts.files_listed) == (7, 8)
    assert data.modalities == ("audio",)
