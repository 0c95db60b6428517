"""Encoders by name: the hub's own client asks a server of this machine that answers like the hub."""

import dataclasses
import hashlib
import inspect
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cmacc
from cmacc.cli import main
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.pretraining import ConfigError, PretrainConfig, pretrain, start_run
from cmacc.transfer import (
    Card,
    EvaluateOptions,
    ExportError,
    PretrainedEncoder,
    evaluate,
    export_run,
    open_encoder,
    read_export,
)
from cmacc.transfer import pretrained as pretrained_module

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


@dataclasses.dataclass
class _Hub:
    """Repositories by name and revision, each a folder, and the files that were asked for."""

    folders: dict[tuple[str, str], Path] = dataclasses.field(default_factory=dict)
    sent: list[str] = dataclasses.field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path, as the hub's documented API gives them."""
        place = path.partition("?")[0].removeprefix("/api/models/").strip("/").split("/")
        repo, kind, revision, *file = "/".join(place[:2]), *place[2:]
        folder = next((f for (r, v), f in self.folders.items() if r == repo and revision in (v, _commit(f))), None)
        if folder is None:
            known = any(r == repo for r, _ in self.folders)
            return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b"{}"
        if kind == "revision":
            return 200, {}, json.dumps({"id": repo, "sha": _commit(folder), "siblings": []}).encode()
        names = sorted(p.name for p in folder.iterdir())
        if kind == "tree":
            entries = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n} for n in names]
            return 200, {}, json.dumps(entries).encode()
        data = (folder / "/".join(file)).read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(folder)}, data


def _commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    """A hub on this machine, with an empty cache."""
    stand_in = _Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = stand_in.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                if "/resolve/" in self.path:
                    stand_in.sent.append(self.path.rpartition("/")[2])
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True  # the client keeps its connections open, and closing would wait for them
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    thread.start()
    yield stand_in
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def run_dir(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "run"
    optim = dataclasses.replace(small_config.optim, steps=3)
    start_run(dataclasses.replace(small_config, optim=optim), folder)
    pretrain(folder)
    return folder


@pytest.fixture(scope="module")
def export(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = export_run(run_dir, tmp_path_factory.mktemp("export") / "export").folder
    (folder / "video.onnx").write_bytes(b"a graph")
    return folder


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def _require_same(encoder: AudioVisualEncoder, folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    assert encoder.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in encoder.state_dict().items())
    assert not any(module.training for module in encoder.modules())


def _edit(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | changes))


# --- load


def test_folders_of_this_machine_are_loaded_without_a_look_at_the_hub(
    run_dir: Path, export: Path, hub: _Hub, tmp_path: Path
) -> None:
    shutil.copytree(export, tmp_path / "me" / "it")
    for name in (run_dir, str(run_dir), export, "me/it", Path("me/it")):
        encoder = cmacc.load(name)
        assert isinstance(encoder, AudioVisualEncoder)
        _require_same(encoder, export)
    with pytest.raises(ExportError, match=r"encoder me/it: revision must be None for a folder, got 'v1'"):
        cmacc.load("me/it", revision="v1")
    for nowhere in (Path("you/it"), "nowhere", "./you/it", "you/it/there"):
        with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
            cmacc.load(nowhere)
    assert hub.sent == []


def test_a_name_is_downloaded_once_and_then_found_offline(
    export: Path, hub: _Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folders["me/it", "main"] = export
    _require_same(cmacc.load("me/it"), export)
    assert sorted(hub.sent) == ["config.json", "model.safetensors"]  # no graph and no card
    _require_same(PretrainedEncoder.from_pretrained("me/it", local_files_only=True), export)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _require_same(cmacc.load("me/it"), export)
    assert len(hub.sent) == 2


def test_a_revision_is_that_of_the_hub(export: Path, copy: Path, hub: _Hub) -> None:
    _edit(copy, step=99)
    hub.folders["me/it", "main"], hub.folders["me/it", "v1"] = export, copy
    assert read_export(cmacc.load("me/it", revision="v1").folder).step == 99
    assert read_export(cmacc.load("me/it").folder).step == 3
    with pytest.raises(ExportError, match=r"encoder me/it: the hub has it, but no revision 'v2' of it"):
        cmacc.load("me/it", revision="v2")


def test_names_that_nobody_has(hub: _Hub) -> None:
    with pytest.raises(
        ExportError, match=r"encoder me/it: must be a folder or a repository on .* hub, got neither; a p"
    ):
        cmacc.load("me/it")
    with pytest.raises(ExportError, match=r"encoder me/a--b: cannot be fetched \(HFValidationError: "):
        cmacc.load("me/a--b")


@pytest.mark.usefixtures("hub", "offline")
def test_what_is_not_in_the_cache_is_not_found_offline() -> None:
    with pytest.raises(ExportError, match=r"encoder me/it: must be a folder or in .* cache, got neither \(.*OFFLINE=0"):
        cmacc.load("me/it")


def test_a_hub_that_does_not_answer(hub: _Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ExportError, match=r"encoder me/it: .* cache, got neither \(Got: ConnectError"):
        cmacc.load("me/it")


def test_of_another_model_only_the_description_is_downloaded(copy: Path, hub: _Hub) -> None:
    hub.folders["me/it", "main"] = copy
    _edit(copy, library="transformers")
    with pytest.raises(ExportError, match=r"encoder me/it: must be an export of cmacc, got another repository"):
        cmacc.load("me/it")
    assert hub.sent == ["config.json"]
    (copy / "config.json").unlink()
    hub.folders["me/it", "main"] = copy.rename(copy.with_name("other commit"))
    with pytest.raises(ExportError, match=r"encoder me/it: must be an export of cmacc"):
        cmacc.load("me/it")


def test_broken_downloads_are_refused_like_any_export(copy: Path, hub: _Hub) -> None:
    hub.folders["me/it", "main"] = copy
    (copy / "model.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(ExportError, match=r"model\.safetensors: must have SHA-256"):
        cmacc.load("me/it")


def test_the_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExportError, match=r"encoder me/it: no such folder, .* pip install 'cmacc\[export\]'"):
        cmacc.load("me/it")


def test_an_evaluation_downloads_only_when_told(
    export: Path, hub: _Hub, small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.folders["me/it", "main"] = export
    command = ["evaluate", "me/it", "--data", str(small_world), "--windows", "1", "--workers", "0", "--no-untrained"]
    command += ["--cache", str(tmp_path / "features")]
    assert main([*command, "--out", str(tmp_path / "card")]) == 2
    assert "got neither; --download (download=True) looks for it on the hub" in capsys.readouterr().err
    assert hub.sent == []
    assert main([*command, "--out", str(tmp_path / "card"), "--download"]) == 0
    facts = Card.read(tmp_path / "card" / "card.json").encoder
    assert (facts.name, facts.checkpoint_step) == ("me/it", 3)
    assert facts == dataclasses.replace(open_encoder(str(export)).facts, name="me/it")
    options = EvaluateOptions(windows=1, workers=0, with_untrained=False, cache=tmp_path / "features")
    again = evaluate("me/it", ["pairs"], small_world, tmp_path / "again", options=options)  # from the hub's cache
    assert again.encoder == facts


# --- publish


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder to which pushed exports are copied; `test_export.py` tests the pushing."""

    def push(folder: Path, repo_id: str) -> str:
        shutil.copytree(folder, tmp_path / "pushed" / repo_id)
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(pretrained_module, "push", push)
    return tmp_path / "pushed"


def test_a_run_is_published_as_an_export_and_loaded_by_name(
    run_dir: Path, export: Path, hub: _Hub, pushed: Path
) -> None:
    assert cmacc.load(run_dir).push_to_hub("me/it") == "https://huggingface.co/me/it"
    assert {p.name for p in (pushed / "me" / "it").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    hub.folders["me/it", "main"] = pushed / "me" / "it"
    _require_same(cmacc.load("me/it", revision="main"), export)


def test_an_export_is_published_as_it_is(export: Path, pushed: Path) -> None:
    PretrainedEncoder.from_pretrained(export).push_to_hub("me/it")
    for path in export.iterdir():
        assert (pushed / "me" / "it" / path.name).read_bytes() == path.read_bytes()


def test_weights_that_were_changed_are_not_published_under_the_old_results(export: Path, pushed: Path) -> None:
    for change in (lambda e: e.video.last.weight.data.add_(1e-3), lambda e: e.half()):
        encoder = cmacc.load(export)
        change(encoder)
        with pytest.raises(ExportError, match=r"encoder of .*export: video\.\S+ must be as in that folder"):
            encoder.push_to_hub("me/it")
    assert not pushed.exists()


def test_a_download_is_not_published_again(export: Path, hub: _Hub) -> None:
    hub.folders["me/it", "main"] = export
    with pytest.raises(ExportError, match=r"must be a file to be uploaded, got a symbolic link"):
        cmacc.load("me/it").push_to_hub("you/it")


def test_the_methods_are_called_like_the_mixins() -> None:
    for name in ("from_pretrained", "push_to_hub"):
        real = inspect.signature(getattr(huggingface_hub.ModelHubMixin, name)).parameters
        ours = inspect.signature(getattr(PretrainedEncoder, name)).parameters
        assert set(ours) - {"name"} <= set(real), name


# --- versions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"made by a newer cmacc, got format 2; cmacc \S+ reads format 1; pip install --upgrade cmacc"),
        ({"requires": {"cmacc": ">=9.1"}}, r"needs cmacc>=9\.1, got \d\S*; pip install 'cmacc>=9\.1'"),
        ({"requires": {"torchvision": ">=0.1", "timm": ">=99"}}, r"needs timm>=99, got \d\S*; pip install 'timm>=99'"),
        ({"requires": {"evil": ">=1"}}, r"requires must name only cmacc, .*, got 'evil'"),
        ({"requires": {"timm": ">=1' evil"}}, r"requires\.timm must be like '>=1\.2', got \">=1' evil\""),
        ({"requires": {"timm": "==1.0"}}, r"requires\.timm must be like '>=1\.2', got '==1\.0'"),
        ({"requires": {"timm": 1}}, r"requires must be dict\[str, str\], got"),
        ({"requires": None}, r"requires must be dict\[str, str\], got None"),
    ],
)
def test_what_is_needed_is_said_before_anything_else(copy: Path, changes: dict[str, Any], message: str) -> None:
    _edit(copy, **changes, encoder={"video": "of the future"})
    with pytest.raises(ExportError, match=rf"config\.json: {message}"):
        cmacc.load(copy)


def test_a_missing_package_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise versions.PackageNotFoundError(name)

    versions = sys.modules["cmacc.transfer.versions"]
    monkeypatch.setattr(versions, "version", version)
    _edit(copy, requires={"timm": ">=1"})
    with pytest.raises(ExportError, match=r"needs timm>=1, got none; pip install 'timm>=1'"):
        read_export(copy)


@pytest.mark.parametrize(
    ("installed", "bound", "is_enough"),
    [("0.10.0", ">=0.9", True), ("0.9.0", ">=0.10", False), ("2.11.0+cpu", ">=2.11", True), ("5.0.0rc1", ">=5", False)],
)
def test_versions_are_compared_as_versions(
    copy: Path, monkeypatch: pytest.MonkeyPatch, installed: str, bound: str, is_enough: bool
) -> None:
    monkeypatch.setattr("cmacc.transfer.versions.version", lambda _: installed)
    _edit(copy, requires={"timm": bound})
    if is_enough:
        read_export(copy)
    else:
        with pytest.raises(ExportError, match="needs timm"):
            read_export(copy)


def test_an_export_says_what_it_needs_and_one_of_0_1_0_still_loads(copy: Path) -> None:
    plain = json.loads((copy / "config.json").read_text())
    assert plain["requires"] == {"cmacc": ">=0.2"}
    # 0.1.0 had neither this nor the poolings, nor the norm, which was batch norm, nor the id of the run.
    pair = AudioVisualEncoder(dataclasses.replace(read_export(copy).pair.config, norm="batch"))
    weights = sys.modules["cmacc.transfer.export"]._write_weights(pair, copy / "model.safetensors")
    del plain["requires"], plain["encoder"]["norm"], plain["pretraining"]["run_id"]
    del plain["encoder"]["frame_pooling"], plain["encoder"]["video_pooling"]
    (copy / "config.json").write_text(json.dumps(plain | {"weights": weights}))
    loaded = cmacc.load(copy)
    assert loaded.config == pair.config != EncoderConfig()
    _require_same(loaded, copy)
