"""``cmacc app``: what it asks for and what it hands on."""

import sys
from pathlib import Path
from typing import Any

import pytest

from cmacc.app.library import Library
from cmacc.app.opened import Opened
from cmacc.cli import main


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `serve` was called with."""
    calls: list[dict[str, Any]] = []
    opened = Opened("x", Library([tmp_path]), None, tmp_path)
    monkeypatch.setattr("cmacc.app.open_target", lambda address, **options: opened)
    monkeypatch.setattr("cmacc.app.serve", lambda opened, **options: calls.append({"opened": opened, **options}))
    monkeypatch.delenv("CMACC_APP_TOKEN", raising=False)
    return calls


def test_this_machine_alone_needs_no_token(served: list[dict[str, Any]]) -> None:
    for host in ([], ["--host", "localhost"], ["--host", "::1"], ["--host", "127.0.0.9"]):
        assert main(["app", "x", *host]) == 0
        assert served[-1]["token"] is None
    assert served[0] | {"opened": None} == {
        "opened": None, "host": "127.0.0.1", "port": 7860, "token": None, "max_upload_bytes": 500_000_000,
        "open_browser": False,
    }  # fmt: skip
    assert main(["app", "x", "--max-upload-mb", "2", "--max-query-minutes", "1.5", "--port", "0", "--open"]) == 0
    assert served[-1]["max_upload_bytes"] == 2_000_000
    assert served[-1]["opened"].longest_query_seconds == 90
    assert (served[-1]["port"], served[-1]["open_browser"]) == (0, True)


def test_other_addresses_need_one(
    served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "name.example"):
        assert main(["app", "x", "--host", host]) == 0
    tokens = [call["token"] for call in served]
    assert len(set(tokens)) == 4
    assert min(map(len, tokens)) >= 32
    file = tmp_path / "token.txt"
    file.write_text("sixteen-letters-\n")
    assert main(["app", "x", "--token-file", str(file)]) == 0
    assert served[-1]["token"] == "sixteen-letters-"
    monkeypatch.setenv("CMACC_APP_TOKEN", "of-the-environment")
    assert main(["app", "x"]) == 0
    assert served[-1]["token"] == "of-the-environment"


def test_bad_input_is_one_line(
    served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(*arguments: str) -> str:
        assert main(["app", "x", *arguments]) == 2
        return capsys.readouterr().err

    assert "--port must be 0 to 65535, got 70000" in failed("--port", "70000")
    assert "--max-upload-mb must be above 0, got 0" in failed("--max-upload-mb", "0")
    assert "--max-query-minutes must be above 0, got nan" in failed("--max-query-minutes", "nan")
    short = tmp_path / "short.txt"
    short.write_text("secret-word")
    message = failed("--token-file", str(short))
    assert "must hold a token of at least 16 letters" in message
    assert "secret-word" not in message
    assert "none.txt" in failed("--token-file", str(tmp_path / "none.txt"))
    monkeypatch.setenv("CMACC_APP_TOKEN", "with spaces in the middle")
    assert "CMACC_APP_TOKEN: must hold a token" in failed()
    assert served == []


def test_without_the_extra_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cmacc.app", None)
    assert main(["app", "x"]) == 2
    assert "app needs the extra `app`: pip install 'cmacc[app,search]'" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["app", "--help"])
    assert left.value.code == 0
    assert "example: cmacc app videos.index" in capsys.readouterr().out
