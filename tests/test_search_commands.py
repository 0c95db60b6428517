"""``cmacc embed`` and ``cmacc search`` as a user calls them, with a run of a few steps."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cmacc.cli import main
from cmacc.pretraining import PretrainConfig, pretrain, start_run
from cmacc.search.writer import writer_lock


@pytest.fixture(scope="module")
def run(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    start_run(small_config, folder)
    pretrain(folder)
    return folder


@pytest.fixture(scope="module")
def videos(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty clips of the small world."""
    folder = tmp_path_factory.mktemp("videos")
    for clip in sorted((small_world.parent / "world").rglob("*.mp4"))[:20]:
        shutil.copy2(clip, folder)
    return folder


@pytest.fixture(scope="module")
def index(run: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "videos.index"
    assert main(["embed", str(run), str(videos), "--out", str(folder), "--workers", "0"]) == 0
    return folder


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that fails for bad input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


def test_a_run_that_finds_nothing_new_says_so(
    run: Path, videos: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    parquet = tmp_path / "rows.parquet"
    embed = ["embed", str(run), str(videos), "--out", str(index), "--workers", "0", "--to-parquet", str(parquet)]
    assert main(embed) == 0
    out = capsys.readouterr().out
    assert "0 files embedded (0.00 h), 0 renamed or relabelled, 0 removed, 20 unchanged\n" in out
    # A 2 s clip has windows of 1 s at 0 s and 1 s, of picture and sound.
    assert f"index: {index}, 80 rows, " in out
    assert f"80 rows: {parquet}" in out
    assert pq.read_metadata(parquet).num_rows == 80
    assert f"{parquet} exists" in failed(capsys, *embed)


def test_the_best_moments_are_printed_or_given_as_json(
    videos: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = sorted(videos.glob("*.mp4"))[4]
    search = ["search", str(index), str(clip), "--by", "video", "--in", "video", "--top", "3", "--false-alarms", "1"]
    capsys.readouterr()
    assert main(search) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("  1. ")
    assert Path(first.rpartition("  ")[2]).parent == videos
    assert main([*search, "--json"]) == 0
    moments = json.loads(capsys.readouterr().out)
    assert len(moments) == 3
    assert {"path", "start_seconds", "end_seconds", "modality", "score", "percentile"} <= set(moments[0])
    scores = [moment["score"] for moment in moments]
    assert scores == sorted(scores, reverse=True)


def test_nothing_found_is_said_plainly(videos: Path, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An encoder after 12 steps tells no clip from others across modalities.
    search = ["search", str(index), str(min(videos.glob("*.mp4"))), "--by", "audio", "--in", "video"]
    capsys.readouterr()
    assert main(search) == 0
    out = capsys.readouterr().out
    note, answer = out.splitlines()
    assert note.startswith("note: to hold a rate of 0.01 takes more videos than the index has")
    assert answer.startswith("nothing found: among 80 windows the best score is ")
    assert "the limit is 1.0%" in out
    assert main([*search, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_bad_input_is_answered_in_one_line(
    run: Path, videos: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = min(videos.glob("*.mp4"))
    assert "no index there; make one with cmacc embed" in failed(capsys, "search", tmp_path / "none", clip)
    assert "--where is not a valid condition" in failed(capsys, "search", index, clip, "--where", "labl = 1")
    cast = failed(capsys, "search", index, clip, "--where", "CAST(path AS INT) > 3")
    assert "--where is not a valid condition" in cast
    assert ".rs:" not in cast
    both = failed(capsys, "search", index, clip, "--at", 1, "--window", 0, 1)
    assert "--at and --window both choose a part of QUERY" in both
    assert "must have a text side, got none" in failed(capsys, "search", index, "--text", "a dog")
    assert "must have a file or a text, got both or none" in failed(capsys, "search", index)
    assert "nothing.wav: no such file" in failed(capsys, "search", index, tmp_path / "nothing.wav")
    embed = ("embed", run, videos, "--workers", 0)
    assert "--part must be I/N" in failed(capsys, *embed, "--out", index, "--part", "3/2")
    parquet = tmp_path / "rows.parquet"
    part = failed(capsys, *embed, "--out", index, "--part", "1/2", "--to-parquet", parquet)
    assert "--to-parquet exports the whole index" in part
    one = failed(capsys, "embed", "statistics", videos, "--out", tmp_path / "x", "--workers", 0)
    assert "must encode video and audio into one space" in one
    with writer_lock(index):
        assert "one writer at a time" in failed(capsys, *embed, "--out", index)
    assert "gone: no such file" in failed(capsys, "embed", run, tmp_path / "gone", "--out", tmp_path / "x")


def test_without_the_extra_the_way_out_is_named(
    videos: Path, index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    message = failed(capsys, "search", index, min(videos.glob("*.mp4")))
    assert "search needs the extra `search`: pip install 'cmacc[search]'" in message
