import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cmacc.cli import main, terminal
from cmacc.clips import Manifest
from cmacc.pretraining import RunOutcome, last_checkpoint, pretrain

TINY_CLIP = [
    "--data.clip.frame_count=4", "--data.clip.frame_rate_hz=4", "--data.clip.frame_height=32",
    "--data.clip.frame_width=32", "--data.clip.audio_seconds=1", "--data.workers=0", "--encoder.mel_bins=32",
    "--dictionary.selector=active", "--dictionary.size=16", "--dictionary.pool_size=24", "--optim.batch_size=8",
    "--optim.warmup_steps=2",
    "--save_every=5", "--precision=fp32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that commands keep are no part of the home of who runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_the_main_job_command_by_command(small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, run = str(tmp_path / "m.parquet"), str(tmp_path / "run")
    assert main(["scan", str(small_world.parent / "world"), "--out", manifest, "--test-fraction", "0.25"]) == 0
    assert "48 samples" in capsys.readouterr().out
    assert len(Manifest.read(manifest).classes()) == 4
    records = list(Manifest.read(manifest).records)
    silent = next(i for i, record in enumerate(records) if record.split == "train")
    records[silent] = dataclasses.replace(records[silent], findings=("silent",))
    Manifest(records).write(manifest)
    assert main(["pretrain", "--data.manifest", manifest, "--out", run, "--optim.steps=10", *TINY_CLIP]) == 0
    assert "excluded 1 of 36 files by what the scan found: 1 silent\n" in capsys.readouterr().err
    evaluate = ["evaluate", run, "--task", "pairs", "labelled", "--data", manifest, "--windows", "2"]
    evaluate += ["--out", run, "--workers", "0"]
    assert main(evaluate) == 0
    out = capsys.readouterr().out
    assert "median_rank" in out
    assert "untrained" in out
    assert main(["report", run]) == 0
    HTMLParser().feed((tmp_path / "run" / "report.html").read_text())
    assert {row["task"] for row in json.loads((tmp_path / "run" / "card.json").read_text())["results"]} == {
        "pairs",
        "labelled",
    }
    assert main(["export", run, "--out", str(tmp_path / "export")]) == 0
    again = ["evaluate", str(tmp_path / "export"), *evaluate[2:-4], "--out", str(tmp_path / "card"), "--workers", "0"]
    assert main(again) == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", run, str(tmp_path / "card" / "card.json")]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| labelled")]
    assert len(table) == 6
    assert all(line.split("|")[6].strip("* ≈") == line.split("|")[7].strip("* ≈") for line in table)
    assert main(["pretrain", "--resume", run]) == 0  # a finished run is left as it is
    assert main(evaluate) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_demo_ends_with_six_results_and_what_to_try_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--clips", "56", "--steps", "2"]) == 0
    captured = capsys.readouterr()
    rows = [line for line in captured.out.splitlines() if line.startswith("│")]
    assert len(rows) == 6
    card = json.loads((out / "card.json").read_text())
    [retrieved] = [r for r in card["results"] if r["modality"] == "video_to_audio" and r["metric"] == "R@1"]
    assert [cell.strip() for cell in rows[0].strip("│").split("│")] == [
        "video finds its audio, R@1",
        *(f"{100 * retrieved[name]:.1f}%" for name in ("value", "untrained", "chance")),
    ]
    assert "scan VIDEOS --out videos.parquet" in captured.out
    assert "pretrain --data.manifest videos.parquet" in captured.out
    assert f"index of the 14 held-out clips: {out / 'index'}" in captured.out or "no search: none of" in captured.out
    assert "search videos.index QUERY" in captured.out
    assert f"cmacc app {out / 'index'}" in captured.out
    # Every stage shows its progress, without a terminal too.
    for stage in ("world: clips 56/56", "scan: files 56/56", "pretrain: steps 2/2", "labelled, linear"):
        assert stage in captured.err
    assert (out / "report.html").is_file()


def test_progress_is_printed_without_a_terminal_also_while_nothing_advances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.01)

    def lines_until(text: str) -> str:
        printed, deadline = "", time.monotonic() + 30
        while text not in printed:
            assert time.monotonic() < deadline, printed
            time.sleep(0.01)
            printed += capsys.readouterr().err
        return printed

    with terminal.progress_bars("embed") as advance:
        lines_until("embed: started 0 s ago\n")
        advance("files", 10, 40)  # a resumed run: what was done before tells nothing about the time left
        lines_until("embed: files 10/40, 0 s\n")
        advance("files", 20, 40, "loss 0.5")
        printed = lines_until("embed: files 20/40, ")
        assert " left, loss 0.5\n" in printed + lines_until("\n")
        advance("files", 40, 40)
        advance("files", 40, 40)
    assert capsys.readouterr().err.count("embed: files 40/40") >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "no-such-folder"], "no-such-folder must be a folder, got nothing there"),
        (
            ["pretrain", "--data.manifest", "no.parquet", "--out", "RUN"],
            "no.parquet: no such file; make one with `cmacc scan",
        ),
        (["pretrain", "--resume", "no-run"], "no-run/config.yaml: no such file"),
        (["pretrain", "--out", "RUN", "--optim.batch_size=1"], "optim.batch_size must be at least 2, got 1"),
        (["evaluate", "no-run", "--data", "WORLD", "--out", "RUN"], "encoder no-run: must be a run or export folder"),
        (["evaluate", "random", "--data", "WORLD"], "ENCODER, --data ROOT and --out DIR must be given, or --compare"),
        (["evaluate", "--compare", "no.json", "no.json"], "card no.json: cannot be read"),
        (
            ["evaluate", "random", "--task", "esc50", "--data", ".", "--out", "RUN"],
            "esc50.csv, must be in ., got none; name",
        ),
        (["export", "no-run", "--out", "RUN"], "no-run/config.yaml: no such file"),
        (["evaluate", "random", "--data", "no.csv", "--out", "RUN"], "no.csv: no such file"),
        (["report", "no-run"], "no-run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, small_world: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(tmp_path / "run"), "WORLD": str(small_world)}
    try:
        code: object = main([places.get(argument, argument) for argument in arguments])
    except SystemExit as exit_:  # argparse and jsonargparse leave by themselves
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_unknown_commands_and_settings_leave_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fly"], [], ["pretrain", "--no.such=1"], ["scan"], ["evaluate", "random", "--task", "sing"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["scan", "pack", "pretrain", "evaluate", "export", "report", "inspect", "localise", "demo"]
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example: cmacc {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cmacc.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'av', 'numpy', 'jsonargparse', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_sigterm_saves_and_leaves_with_a_code_of_its_own(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a scheduler sends it, several times, also to the workers that decode."""
    import cmacc.pretraining

    def terminated(run_dir: Path, **options: Any) -> RunOutcome:
        def on_step(done: int, total: int, row: dict[str, float]) -> None:
            if done == 2:
                for process in [os.getpid(), os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                    os.kill(process or 0, signal.SIGTERM)

        return pretrain(run_dir, **{**options, "on_step": on_step})

    monkeypatch.setattr(cmacc.pretraining, "pretrain", terminated)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["pretrain", "--data.manifest", str(small_world), "--out", str(tmp_path / "run"), "--optim.steps=50"]
    assert main([*arguments, *TINY_CLIP, "--data.workers=1"]) == 75
    captured = capsys.readouterr()
    assert f"stopped at step 3 of 50\nresume it with: cmacc pretrain --resume {tmp_path / 'run'}\n" in captured.out
    assert captured.err.count("stopping after this step") == 1
    assert last_checkpoint(tmp_path / "run").name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("how", "code", "says"), [(signal.SIGTERM, 75, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_before_the_first_step_signals_leave_at_once(
    how: signal.Signals, code: int, says: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import cmacc.pretraining

    monkeypatch.setattr(cmacc.pretraining, "start_run", lambda *_, **__: os.kill(os.getpid(), how))
    assert main(["pretrain", "--data.manifest", "any.parquet", "--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err == f"cmacc pretrain: {says}\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_or_killed_goes_on(
    how: signal.Signals, small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--data.manifest", str(small_world), "--out", str(tmp_path), "--optim.steps=4000"]
    start = [sys.executable, "-m", "cmacc", *arguments, *TINY_CLIP]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("checkpoints/step-*"))) == 0:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"cmacc pretrain --resume {tmp_path}" in out
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoints/step-*"))
    step = int(checkpoints[-1].removeprefix("step-"))
    assert 0 < step < 4000
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("steps: 4000", f"steps: {step + 3}"))
    resume = ["pretrain", "--resume", str(tmp_path)]
    assert main(resume) == 2
    assert "config.yaml must have hash" in capsys.readouterr().err  # an edited run is another run
    (tmp_path / "provenance.json").unlink()  # as in a run of the version before; or the test would take 4,000 steps
    assert main(resume) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(step + 3))
