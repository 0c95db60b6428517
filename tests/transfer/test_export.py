"""Exports: what is written is what is read, in torch and in ONNX; what is broken is refused; nothing is lost."""

import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cmacc
from cmacc.clips import ClipSpec, Manifest, decode_clip
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.objectives import Terms
from cmacc.pretraining import (
    CheckpointError,
    DictionaryConfig,
    ObjectiveConfig,
    PretrainConfig,
    last_checkpoint,
    load_encoder,
    mark_best,
    pretrain,
    start_run,
)
from cmacc.transfer import CmaccEncoder, load_pair, open_encoder
from cmacc.transfer import export as export_module
from cmacc.transfer.export import Exported, ExportError, export_run, is_export, push, read_export
from cmacc.transfer.model_card import model_card
from cmacc.transfer.onnx import EncoderGraph, largest_difference, write_graph

RESULTS = "| task | value |\n|---|---|\n| pairs {R@1} | 0.25 |"


@pytest.fixture(scope="module")
def run_dir(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    start_run(small_config, folder)
    pretrain(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The run without graphs. Tests that break files break a copy."""
    return export_run(run_dir, tmp_path_factory.mktemp("plain") / "export", results_markdown=RESULTS)


@pytest.fixture(scope="module")
def with_graphs(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("onnxruntime")
    return export_run(run_dir, tmp_path_factory.mktemp("onnx") / "export", with_onnx=True)


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def clips(small_config: PretrainConfig, small_world: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and waveforms of seven files."""
    decoded = [decode_clip(r.path, 0.3, small_config.data.clip) for r in list(Manifest.read(small_world).records)[:7]]
    return torch.stack([c.frames for c in decoded]), torch.stack([c.waveform for c in decoded])


@torch.inference_mode()
def _outputs(encoder: CmaccEncoder, clips: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    video, audio = encoder.embed_video(clips[0]), encoder.embed_audio(clips[1])
    return [video, encoder.match_video(video), audio, encoder.match_audio(audio)]


def _encoder_of(folder: Path) -> CmaccEncoder:
    read = read_export(folder)
    return CmaccEncoder(read.pair, read.clip, read.is_grey)


def test_what_is_read_gives_the_runs_embeddings_to_the_bit(
    run_dir: Path, small_config: PretrainConfig, exported: Exported, clips: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pair = AudioVisualEncoder(small_config.encoder)
    load_encoder(pair, last_checkpoint(run_dir))
    wanted = _outputs(CmaccEncoder(pair.eval(), small_config.data.clip, is_grey=False), clips)
    for got, want in zip(_outputs(_encoder_of(exported.folder), clips), wanted, strict=True):
        assert torch.equal(got, want)


def test_everything_about_the_run_is_read_back(
    exported: Exported, small_config: PretrainConfig, small_world: Path
) -> None:
    read = read_export(exported.folder)
    assert read.pair.config == small_config.encoder
    assert not read.pair.training
    assert (read.clip, read.is_grey, read.step, read.seed) == (small_config.data.clip, False, 12, 0)
    assert read.pretraining_data == Manifest.read(small_world).fingerprint()
    digest = hashlib.sha256((exported.folder / "model.safetensors").read_bytes()).hexdigest()
    assert read.weights == exported.weights == digest
    assert exported.step == 12
    assert exported.differences == {}
    plain = json.loads((exported.folder / "config.json").read_text())
    assert plain["onnx"] is None
    assert plain["pretraining"]["settings"]["optim"]["batch_size"] == 8


def test_reading_leaves_the_random_numbers_alone(exported: Exported) -> None:
    before = torch.get_rng_state()
    read_export(exported.folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_checkpoint_of_a_run_is_opened_and_exported_by_its_path(
    run_dir: Path, small_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    earlier, last = run / "checkpoints" / "step-00000010", open_encoder(str(run)).facts
    with pytest.raises(CheckpointError, match="no checkpoint is marked as the best"):
        open_encoder(str(run / "checkpoints" / "best"))
    mark_best(run, 10, 0.5, "knn")
    pair = AudioVisualEncoder(small_config.encoder)
    load_encoder(pair, earlier)
    monkeypatch.chdir(run)  # where checkpoints/best looks like a name on the hub
    for number, path in enumerate((earlier, run / "checkpoints" / "best", Path("checkpoints/best"))):
        facts = open_encoder(str(path)).facts
        assert Path(facts.name).resolve() == earlier  # what is the best may change
        assert (facts.checkpoint_step, last.checkpoint_step) == (10, 12)
        assert facts.run_id == last.run_id
        assert facts.weights != last.weights
        assert export_run(path, tmp_path / f"export-{number}").step == 10
        for loaded in (load_pair(path), cmacc.load(str(path))):
            assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in pair.state_dict().items())
    with pytest.raises(CheckpointError, match=r"among those of its run \(step-00000010, step-00000012\), got nothing"):
        open_encoder(str(run / "checkpoints" / "step-00000011"))


def test_the_same_weights_give_the_same_file(run_dir: Path, exported: Exported, tmp_path: Path) -> None:
    assert export_run(run_dir, tmp_path / "again").weights == exported.weights


def test_the_folder_holds_the_query_encoders_no_pickle_and_no_path_of_this_machine(
    exported: Exported, small_world: Path
) -> None:
    assert {p.name for p in exported.folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    tensors = load_file(exported.folder / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"video", "audio"}
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.int64}
    for path in exported.folder.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80")), f"{path.name} is a zip or a pickle"
        assert str(small_world.parent).encode() not in data
        assert str(Path.home()).encode() + b"/" not in data


def test_a_grey_run_stays_grey_and_needs_no_manifest(
    run_dir: Path, small_world: Path, tmp_path: Path, clips: tuple[torch.Tensor, torch.Tensor]
) -> None:
    grey = Path(shutil.copytree(run_dir, tmp_path / "run"))
    config = (grey / "config.yaml").read_text()
    config, count = re.subn(r"grey_probability: \S+", "grey_probability: 1.0", config)
    assert count == 1
    (grey / "config.yaml").write_text(config.replace(str(small_world), str(tmp_path / "gone.parquet")))
    read = read_export(export_run(grey, tmp_path / "export").folder)
    assert read.is_grey
    assert read.pretraining_data == Manifest.read(small_world).fingerprint()
    encoder, swapped = _encoder_of(tmp_path / "export"), clips[0].clone()
    swapped[..., 0] += (swapped[..., 0] < 255).to(torch.uint8)
    same = encoder.embed_video(clips[0].float().mean(-1, keepdim=True).expand(clips[0].shape).to(torch.uint8))
    assert not torch.equal(encoder.embed_video(clips[0]), same)
    assert not torch.equal(encoder.embed_video(swapped), encoder.embed_video(clips[0]))


# --- the model card


def test_the_hub_reads_the_model_card(exported: Exported) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(exported.folder / "README.md")
    assert card.data.library_name == "cmacc"
    assert card.data.license is None
    assert card.data.pipeline_tag == "feature-extraction"
    assert "contrastive-learning" in card.data.tags
    assert "onnx" not in card.data.tags
    assert RESULTS in card.text
    for fact in (
        "`(B, 4, 32, 32, 3)`",
        "`(B, 16000)`",
        "4 per second",
        "1 s at 16000 Hz",
        "12 of 12, with batches of 8 clips",
    ):
        assert fact in card.text, fact
    assert "`active` from a pool of 24" in card.text
    assert "onnxruntime" not in card.text


def test_the_card_of_a_run_on_one_modality_says_what_was_not_trained(
    exported: Exported, small_config: PretrainConfig
) -> None:
    plain = json.loads((exported.folder / "config.json").read_text())
    pair = AudioVisualEncoder(small_config.encoder)
    of_two = model_card(small_config, pair, plain, "")
    assert "common space of video and\naudio" in of_two
    assert "was trained" not in of_two
    encoder = dataclasses.replace(small_config.encoder, video_input="differences")
    objective = ObjectiveConfig(terms=Terms(cross_modal=0.0, ctp=1.0))
    alone = dataclasses.replace(
        small_config, encoder=encoder, objective=objective, dictionary=DictionaryConfig(selector="none")
    )
    text = model_card(alone, pair, plain, "")
    assert "by `ctp`.\n**Only the video encoder was trained**: the audio encoder has its first weights" in text
    assert "inside, what changes from frame to frame" in text
    assert "common space" not in text
    assert "Negatives" not in text
    assert "CM-ACC" not in text


def test_a_graph_of_frame_differences_gives_what_torch_gives(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    config = EncoderConfig(video_input="differences", video_pooling="mean", hidden_size=16, embedding_size=8)
    clip = ClipSpec(frame_count=4, frame_height=16, frame_width=16, audio_seconds=0.5)
    encoder = CmaccEncoder(AudioVisualEncoder(config).eval(), clip, is_grey=False)
    assert write_graph(EncoderGraph(encoder, "video"), tmp_path / "video.onnx") < 1e-5


def _python_blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def test_the_cards_example_runs(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.folder)
    (block,) = _python_blocks(exported.folder)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["similarity"].shape == (2, 2)


# --- ONNX


@pytest.mark.slow
def test_the_graphs_give_what_torch_gives(
    with_graphs: Exported, clips: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder_of(with_graphs.folder)
    for size in (1, 2, 7):
        few = (clips[0][:size], clips[1][:size])
        wanted = _outputs(encoder, few)
        for i, (modality, inputs) in enumerate(zip(("frames", "waveforms"), few, strict=True)):
            got = _run_graph(with_graphs.folder / ("video.onnx", "audio.onnx")[i], modality, inputs)
            for array, want in zip(got, wanted[2 * i : 2 * i + 2], strict=True):
                assert np.allclose(array, want.numpy(), atol=1e-5)
            assert np.allclose(np.linalg.norm(got[1], axis=1), 1, atol=1e-5)
    assert set(with_graphs.differences) == {"video", "audio"}
    assert 0 < max(with_graphs.differences.values()) < 1e-5
    plain = json.loads((with_graphs.folder / "config.json").read_text())
    assert plain["onnx"] == {"tolerance": 1e-4, "differences": with_graphs.differences}
    monkeypatch.chdir(with_graphs.folder)
    names: dict[str, Any] = {}
    for block in _python_blocks(with_graphs.folder):
        exec(block, names)
    zeros = torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8)
    want = encoder.match_video(encoder.embed_video(zeros)).detach().numpy()
    assert np.allclose(names["video_embedding"], want, atol=1e-5)


def _run_graph(path: Path, name: str, inputs: torch.Tensor) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == [name]
    assert session.get_inputs()[0].shape == ["batch", *inputs.shape[1:]]
    results: list[Any] = session.run(["feature", "embedding"], {name: inputs.numpy()})
    return results


@pytest.mark.slow
def test_the_graphs_tell_nothing_of_this_machine(with_graphs: Exported) -> None:
    names = {p.name for p in with_graphs.folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md", "video.onnx", "audio.onnx"}
    for name in ("video.onnx", "audio.onnx"):
        data = (with_graphs.folder / name).read_bytes()
        for trace in (b".py", b"stack_trace", str(Path(__file__).parents[2]).encode()):
            assert trace not in data, trace


@pytest.mark.slow
def test_silence_and_black_frames_are_the_same_too(with_graphs: Exported) -> None:
    encoder, clip = _encoder_of(with_graphs.folder), read_export(with_graphs.folder).clip
    quiet = torch.zeros(2, clip.sample_count)
    quiet[1, 0] = 1.0  # a click at the very edge, where the transform pads
    black = torch.zeros(2, clip.frame_count, clip.frame_height, clip.frame_width, 3, dtype=torch.uint8)
    assert largest_difference(EncoderGraph(encoder, "audio"), with_graphs.folder / "audio.onnx", quiet) < 1e-5
    assert largest_difference(EncoderGraph(encoder, "video"), with_graphs.folder / "video.onnx", black) < 1e-5


@pytest.mark.slow
def test_torchvisions_backbones_export_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    clip = ClipSpec(frame_count=4, frame_height=32, frame_width=32, audio_seconds=0.5)
    config = EncoderConfig("r2plus1d_18", "resnet18_1d", mel_bins=32, head="linear", embedding_size=16)
    encoder = CmaccEncoder(AudioVisualEncoder(config).eval(), clip, is_grey=True)
    capfd.readouterr()
    assert write_graph(EncoderGraph(encoder, "video"), tmp_path / "video.onnx") < 1e-5
    assert write_graph(EncoderGraph(encoder, "audio"), tmp_path / "audio.onnx") < 1e-5
    assert capfd.readouterr() == ("", ""), "the exporter chatters"


def test_small_audio_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    clip = ClipSpec(frame_count=4, frame_height=32, frame_width=32, audio_seconds=0.5)
    config = EncoderConfig(audio="small", mel_bins=32, hidden_size=16, embedding_size=16)
    encoder = CmaccEncoder(AudioVisualEncoder(config).eval(), clip, is_grey=True)
    assert write_graph(EncoderGraph(encoder, "audio"), tmp_path / "audio.onnx") < 1e-4


def test_towers_export_for_batches_of_any_size(tmp_path: Path) -> None:
    """CLIP over frames, whose lookup of positions has the name of our output; a graph is refused in one line."""
    pytest.importorskip("onnxruntime")
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    square = {"height": 32, "width": 32}
    for part in (transformers.CLIPModel(settings), transformers.CLIPImageProcessor(size=square, crop_size=square)):
        part.save_pretrained(tmp_path / "clip")
    audio = "python:cmacc.encoders.towers.packaged:speech_embedding"
    config = EncoderConfig(f"hf:{tmp_path / 'clip'}", audio, embedding_size=16)
    clip = ClipSpec(frame_count=2, frame_rate_hz=2.0, frame_height=32, frame_width=32, audio_seconds=1.0)
    encoder = CmaccEncoder(AudioVisualEncoder(config).eval(), clip, is_grey=False)
    assert write_graph(EncoderGraph(encoder, "video"), tmp_path / "video.onnx") < 1e-5
    with pytest.raises(ExportError, match=r"audio\.onnx: encoder\.audio=python:.* cannot be converted to ONNX; export"):
        write_graph(EncoderGraph(encoder, "audio"), tmp_path / "audio.onnx")


@pytest.mark.slow
def test_a_graph_that_is_wrong_leaves_nothing_behind(
    run_dir: Path, with_graphs: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    wrong = onnx.load(with_graphs.folder / "video.onnx")
    (weight,) = (tensor for tensor in wrong.graph.initializer if tensor.name.endswith("video.last.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] *= 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=wrong))
    monkeypatch.setattr("cmacc.transfer.onnx._name_outputs", lambda _: None)  # it has the right ones
    (tmp_path / "here").mkdir()
    with pytest.raises(ExportError, match=r"video.onnx: must differ from torch by at most 0.0001, got 0\.0"):
        export_run(run_dir, tmp_path / "here" / "out", with_onnx=True)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_difference_that_is_no_number_is_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN compares false to everything, and so must not be what lets a graph through."""
    pytest.importorskip("onnxruntime")
    encoder = _encoder_of(exported.folder)
    monkeypatch.setattr("cmacc.transfer.onnx.largest_difference", lambda *_: float("nan"))
    model = SimpleNamespace(graph=SimpleNamespace(node=[], value_info=[]), functions=[], SerializeToString=lambda: b"")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=model))
    monkeypatch.setattr("cmacc.transfer.onnx._name_outputs", lambda _: None)
    with pytest.raises(ExportError, match="got nan"):
        write_graph(EncoderGraph(encoder, "audio"), exported.folder.parent / "nan.onnx")


def test_without_the_extra_the_remedy_is_named(
    run_dir: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"onnx needs the extra `export`: pip install 'cmacc\[export\]'"):
        export_run(run_dir, tmp_path / "out", with_onnx=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExportError, match=r"huggingface_hub needs the extra `export`"):
        push(exported.folder, "me/it")


# --- broken exports


def _edit_config(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        at, _, leaf = name.rpartition("__")
        (plain[at] if at else plain)[leaf] = value
    (folder / "config.json").write_text(json.dumps(plain))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Tensors that somebody changed who knew to correct the hash."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    _edit_config(folder, weights=hashlib.sha256(path.read_bytes()).hexdigest())


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "change",
    [lambda d: d[:-1], lambda d: b"", lambda d: d + b"\0", lambda d: _flip(d, -1), lambda d: _flip(d, 9)],
    ids=["cut", "empty", "longer", "bit of a weight", "bit of the header"],
)
def test_weights_that_were_changed_are_refused(copy: Path, change: Callable[[bytes], bytes]) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match=r"model\.safetensors: must have SHA-256 [0-9a-f]{64}, as config"):
        read_export(copy)


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04.", b"\xff" * 8 + b"{}", b"\2" + b"\0" * 7 + b"[]"], ids=["empty", "pickle", "long", "list"]
)
def test_files_that_are_no_safetensors_are_refused_also_with_the_right_hash(copy: Path, data: bytes) -> None:
    (copy / "model.safetensors").write_bytes(data)
    _edit_config(copy, weights=hashlib.sha256(data).hexdigest())
    with pytest.raises(ExportError, match=r"model\.safetensors: cannot be read"):
        read_export(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("video.last.weight"), r"model\.safetensors: video\.last\.weight is missing"),
        (lambda t: t.update(x=torch.zeros(1)), r"model\.safetensors: x has no place in the encoders"),
        (
            lambda t: t.update({"audio.last.weight": torch.zeros(16, 3)}),
            r"audio\.last\.weight must be torch\.float32 of shape \(16, 32\), got torch\.float32 of shape \(16, 3\)",
        ),
        (
            lambda t: t.update({"audio.last.weight": t["audio.last.weight"].half()}),
            r"audio\.last\.weight must be torch\.float32 .* got torch\.float16",
        ),
        (lambda t: t["video.last.weight"].fill_(float("nan")), r"video\.last\.weight must be finite"),
    ],
    ids=["missing", "foreign", "shape", "half", "nan"],
)
def test_tensors_that_do_not_fit_are_named(
    copy: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    _edit_tensors(copy, edit)
    with pytest.raises(ExportError, match=message):
        read_export(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "made by a newer cmacc, got format 2"),
        ({"format": 0}, "format must be 1, got 0"),
        ({"format": "1"}, "format must be 1, got '1'"),
        ({"library": "transformers"}, "library must be cmacc, got 'transformers'"),
        ({"is_grey": 0}, "is_grey must be bool, got 0"),
        ({"step": True}, "step must be int, got True"),
        ({"seed": "0"}, "seed must be int, got '0'"),
        ({"weights": None}, "weights must be str, got None"),
        ({"encoder": []}, r"encoder must be an object, got \[\]"),
        ({"pretraining": None}, r"pretraining must be dict\[.*, got None"),
        ({"pretraining__data": 3}, r"data must be str or null, got 3"),
        ({"encoder__video": "../../etc"}, r"EncoderConfig: video must be one of tiny, .* got '\.\./\.\./etc'"),
        ({"encoder__video": ["tiny"]}, r"encoder\.video must be str, got \['tiny'\]"),
        ({"encoder__hidden_size": 32.0}, r"encoder\.hidden_size must be int, got 32\.0"),
        ({"encoder__hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"encoder__hidden_size": 10**12}, r"must be torch\.float32 of shape"),
        ({"encoder__embedding_size": 10**25}, "encoder cannot be built"),
        ({"encoder__path": "/etc/passwd"}, r"unknown setting encoder\.path of EncoderConfig"),
        ({"clip__frame_count": "4"}, r"clip\.frame_count must be int, got '4'"),
        ({"clip__frame_rate_hz": None}, r"clip\.frame_rate_hz must be float, got None"),
        ({"clip__frame_rate_hz": 10**400}, "int too large to convert to float"),
        ({"clip__audio_seconds": float("nan")}, "audio_seconds must be positive, got nan"),
        ({"clip__short_files": "burn"}, r"clip\.short_files must be one of pad, loop, refuse, got 'burn'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_other_types_or_values_are_named(copy: Path, changes: dict[str, Any], message: str) -> None:
    _edit_config(copy, **changes)
    with pytest.raises(ExportError, match=rf"config\.json: .*{message}|model\.safetensors: .*{message}"):
        read_export(copy)


@pytest.mark.parametrize("name", ["step", "encoder__mel_bins", "clip__frame_count", "pretraining__data"])
def test_settings_that_are_missing_are_named(copy: Path, name: str) -> None:
    plain = json.loads((copy / "config.json").read_text())
    at, _, leaf = name.rpartition("__")
    del (plain[at] if at else plain)[leaf]
    (copy / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ExportError, match=rf"config\.json: .*{leaf} is missing"):
        read_export(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "\udcff", "[" * 100_000, '{"step": ' + "9" * 5000 + "}"],
    ids=["empty", "cut", "list", "no text", "deep", "long number"],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert not is_export(copy)
    with pytest.raises(ExportError, match=r"config\.json: (cannot be read|must be an object)"):
        read_export(copy)


def test_numbers_written_by_others_are_read(copy: Path) -> None:
    """JSON of other languages writes 4.0 as 4."""
    _edit_config(copy, clip__frame_rate_hz=4)
    assert read_export(copy).clip.frame_rate_hz == 4


def test_missing_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nowhere/config\.json: cannot be read"):
        read_export(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors: cannot be read"):
        read_export(copy)


def test_what_is_an_export(exported: Exported, run_dir: Path, copy: Path) -> None:
    assert is_export(exported.folder)
    assert not is_export(run_dir)
    assert not is_export(run_dir / "missing")
    _edit_config(copy, format=2)
    assert is_export(copy)  # so that `read_export` can say what is the matter
    (copy / "config.json").write_text('{"model_type": "bert"}')
    assert not is_export(copy)


# --- where it is written


def test_an_export_is_replaced_only_when_asked(run_dir: Path, copy: Path) -> None:
    _edit_config(copy, step=1)
    (copy / "video.onnx").write_bytes(b"of other weights")
    with pytest.raises(ExportError, match="must be new or empty, got an export; give --overwrite"):
        export_run(run_dir, copy)
    assert read_export(copy).step == 1
    export_run(run_dir, copy, overwrite=True)
    assert read_export(copy).step == 12
    assert not (copy / "video.onnx").exists()
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_no_folder_of_something_else_is_ever_replaced(run_dir: Path, copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (copy / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(copy)
    for out, message in (
        (other, "got a folder with config.json"),
        (copy, "got a folder with thesis.tex"),
        (run_dir, "got a folder with checkpoints"),
        (tmp_path / "file", "must be a folder, got a file"),
        (tmp_path / "link", "must be a folder, got a symbolic link"),
    ):
        before = sorted(out.rglob("*")) if out.is_dir() else []
        with pytest.raises(ExportError, match=message):
            export_run(run_dir, out, overwrite=True)
        assert (sorted(out.rglob("*")) if out.is_dir() else []) == before
    assert (copy / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ExportError, match="must be where a folder can be made"):
        export_run(run_dir, tmp_path / "file" / "below")


def test_an_empty_folder_and_a_deep_one_are_taken(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        export_run(run_dir, out)
        assert is_export(out)
        assert out.stat().st_mode & 0o777 == 0o755


def test_a_stop_half_way_leaves_what_was_there(run_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "model_card", stop)
    _edit_config(copy, step=1)
    with pytest.raises(KeyboardInterrupt):
        export_run(run_dir, copy, overwrite=True)
    assert read_export(copy).step == 1
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_a_rename_that_fails_puts_back_what_was_there(
    run_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.rename, []

    def replace(source: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        real(source, target)
        return target

    monkeypatch.setattr(Path, "replace", replace)
    _edit_config(copy, step=1)
    with pytest.raises(OSError, match="no"):
        export_run(run_dir, copy, overwrite=True)
    assert len(calls) == 3
    assert read_export(copy).step == 1
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_weights_that_are_not_finite_are_not_exported(run_dir: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run_dir, tmp_path / "run"))
    path = last_checkpoint(broken) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["encoder.audio.last.weight"][0, 0] = float("inf")
    save_file(tensors, path)
    state = json.loads((path.parent / "state.json").read_text())
    del state["files"], state["digest"]  # as before format 4, or the change would be found by its checksum
    (path.parent / "state.json").write_text(json.dumps(state | {"format": 3}))
    with pytest.raises(ExportError, match=r"audio\.last\.weight must be finite"):
        export_run(broken, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- the hub


@dataclasses.dataclass
class _Hub:
    """Stands in for the hub: repositories are folders, and the client's own rules choose the files."""

    root: Path
    private: list[bool] = dataclasses.field(default_factory=list)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private.append(private)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        allow_patterns: list[str],
        delete_patterns: list[str],
        commit_message: str,
    ) -> None:
        from huggingface_hub.utils import filter_repo_objects

        repo = self.root / repo_id
        there = [str(p.relative_to(repo)) for p in repo.rglob("*") if p.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns):
            (repo / name).unlink()
        files = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(folder_path / name, repo / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    stand_in = _Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda _api, *a, _name=name, **k: getattr(stand_in, _name)(*a, **k)
        )
    return stand_in


def test_what_is_pushed_is_what_is_loaded(
    copy: Path, hub: _Hub, clips: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    (copy / "secret.env").write_text("TOKEN=1")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("x")
    repo = hub.root / "me" / "it"
    repo.mkdir(parents=True)
    (repo / "audio.onnx").write_bytes(b"of older weights")
    (repo / ".gitattributes").write_text("the hub's own")
    assert push(copy, "me/it") == "https://huggingface.co/me/it"
    assert hub.private == [True]
    names = {p.name for p in repo.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md", ".gitattributes"}
    # The hub's cache, where `snapshot_download` leads to, holds links to files named by their hash.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in names:
        (snapshot / name).symlink_to(repo / name)
    for got, want in zip(_outputs(_encoder_of(snapshot), clips), _outputs(_encoder_of(copy), clips), strict=True):
        assert torch.equal(got, want)


def test_nothing_broken_and_nothing_behind_a_link_is_pushed(copy: Path, hub: _Hub, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("private")
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ExportError, match=r"README\.md: must be a file to be uploaded, got a symbolic link"):
        push(copy, "me/it")
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="must have SHA-256"):
        push(copy, "me/it")
    assert not hub.root.exists()


def test_the_clients_calls_are_those_that_the_stand_in_answers() -> None:
    """The stand-in's arguments must be the real client's, or a push that passes here fails there."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    for name in ("create_repo", "upload_folder"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert set(inspect.signature(getattr(_Hub, name)).parameters) <= set(real), name
