"""Towers of ONNX graphs against the torch modules that they were exported from."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from cmacc.clips import to_video
from cmacc.encoders.towers import TowerError, TowerInput, open_tower, tower_files
from cmacc.encoders.towers.tower import VideoTower


class Flat(nn.Module):
    """A linear layer on the mean over the last axes; of whole numbers 0..255 first to [0, 1]."""

    def __init__(self, axes: tuple[int, ...], inputs: int, *, two: bool = False) -> None:
        super().__init__()
        self.axes = axes
        self.two = two
        self.layer = nn.Linear(inputs, 5)

    def forward(self, inputs: Tensor) -> Any:
        pixels = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
        feature = self.layer(pixels.mean(self.axes) if self.axes else pixels)
        return (feature.neg(), feature) if self.two else feature


def write(
    path: Path,
    module: nn.Module,
    inputs: Tensor,
    outputs: tuple[str, ...] = ("out",),
    metadata: dict[str, Any] | None = None,
) -> str:
    """Write a graph whose first axis may vary; returns the name of its tower."""
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (inputs,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {key: str(value) for key, value in (metadata or {}).items()})
    path.write_bytes(model.SerializeToString())
    return f"onnx:{path}"


PIXELS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def test_waveforms(tmp_path: Path) -> None:
    module = Flat((), 400)
    name = write(tmp_path / "a.onnx", module, torch.rand(2, 400), metadata={"sample_rate_hz": 8000})
    tower = open_tower(name, "audio")
    assert tower.takes == TowerInput(audio_seconds=0.05, sample_rate_hz=8000)
    assert tower.feature_size == 5
    assert not tower.can_train
    waveforms = torch.rand(3, 400, requires_grad=True)
    features = tower(waveforms)
    assert not features.requires_grad
    torch.testing.assert_close(features, module(waveforms).detach())
    with pytest.raises(TowerError, match=r"a\.onnx: must take shape \('.*', 400\), got \(3, 399\)"):
        tower(torch.rand(3, 399))
    assert tower_files(name) == [tmp_path / "a.onnx"]


def test_frames_as_cmacc_exports_them(tmp_path: Path) -> None:
    """uint8 in, two outputs of which the feature is taken, rates from the config beside it."""
    module = Flat((1, 2, 3), 3, two=True)
    frames = torch.randint(0, 256, (2, 4, 6, 8, 3), dtype=torch.uint8)
    name = write(tmp_path / "video.onnx", module, frames, ("embedding", "feature"), {"frame_rate_hz": 99})
    tower = open_tower(name, "video")
    assert tower.takes == TowerInput(4, 99.0, 6, 8)
    config = {"library": "cmacc", "clip": {"frame_rate_hz": 7.5, "sample_rate_hz": 16000}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_tower(name, "video").takes == TowerInput(4, 7.5, 6, 8)
    assert tower_files(name) == [tmp_path / "video.onnx", tmp_path / "config.json"]
    torch.testing.assert_close(tower(to_video(frames)), module(frames)[1].detach())


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_images_are_normalised_as_the_metadata_says(tmp_path: Path, pooling: Any) -> None:
    module = Flat((2, 3), 3)
    name = write(tmp_path / "image.onnx", module, torch.rand(2, 3, 6, 8), metadata=PIXELS)
    tower = open_tower(name, "video", frame_pooling=pooling)
    assert tower.takes == TowerInput(frame_height=6, frame_width=8)
    frames = torch.randint(0, 256, (2, 4, 6, 8, 3), dtype=torch.uint8)
    mean, deviation = (torch.tensor(PIXELS[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (frames.permute(0, 1, 4, 2, 3) / 255 - mean) / deviation
    features = torch.stack([module(images[:, i]) for i in range(4)]).mean(0)
    torch.testing.assert_close(tower(to_video(frames)).detach(), features.detach(), atol=1e-5, rtol=1e-5)


def test_clips_of_floats(tmp_path: Path) -> None:
    module = Flat((2, 3, 4), 3)
    name = write(tmp_path / "clip.onnx", module, torch.rand(2, 3, 4, 6, 8), metadata=PIXELS | {"frame_rate_hz": 5})
    tower = open_tower(name, "video")
    assert isinstance(tower, VideoTower)
    assert tower.takes == TowerInput(4, 5.0, 6, 8)
    video = torch.randn(2, 3, 4, 6, 8)
    torch.testing.assert_close(tower(video), module(tower.normalise(video)).detach())


def test_the_graph_goes_where_weights_go(tmp_path: Path) -> None:
    first, second = Flat((), 400), Flat((), 400)
    names = [
        write(tmp_path / f"{i}.onnx", module, torch.rand(2, 400), metadata={"sample_rate_hz": 8000})
        for i, module in enumerate((first, second))
    ]
    tower, other = (open_tower(name, "audio") for name in names)
    waveforms = torch.rand(2, 400)
    expected = tower(waveforms)
    for same in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(same(waveforms), expected)
    assert not torch.equal(other(waveforms), expected)
    other.load_state_dict(tower.state_dict())
    assert torch.equal(other(waveforms), expected)
    assert not list(tower.parameters())


def bare(path: Path, axes: tuple[int, ...], outputs: tuple[str, ...] = ("out",), **metadata: str) -> str:
    """Write a graph of float inputs ``(M, *axes)`` that returns them, of images their mean; far faster than torch's."""
    operation = ("ReduceMean", {"axes": [2, 3], "keepdims": 0}) if len(axes) == 3 else ("Identity", {})
    shape = ["M", *(axes[:1] if len(axes) == 3 else axes)]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operation[0], ["x"], [output], **operation[1]) for output in outputs],
        "bare",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", *axes])],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape) for output in outputs],
    )
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return f"onnx:{path}"


def test_graphs_that_do_not_do(tmp_path: Path) -> None:
    audio = bare(tmp_path / "audio.onnx", (400,))
    fast = bare(tmp_path / "fast.onnx", (400,), sample_rate_hz="8 kHz")
    image = bare(tmp_path / "image.onnx", (3, 6, 8), mean="[1, 2]", std="3")
    unnamed = bare(tmp_path / "unnamed.onnx", (400,), ("a", "b"))
    long = bare(tmp_path / "long.onnx", (4, 4))
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    for name, modality, reason in (
        (audio, "audio", "takes 400 samples, so its metadata must state sample_rate_hz"),
        (fast, "audio", "sample_rate_hz must be a positive number, got '8 kHz'"),
        (audio, "video", r"as an encoder of video it must take uint8 .*, got tensor\(float\) \(\*, 400\)"),
        (
            image,
            "audio",
            r"as an encoder of audio it must take float waveforms .*, got tensor\(float\) \(\*, 3, 6, 8\)",
        ),
        (image, "video", r"its metadata must state mean of pixels in \[0, 1\] as a JSON list .*, got '\[1, 2\]'"),
        (unnamed, "audio", "must have one output, or one called feature, got a, b"),
        (long, "audio", r"out must have shape \(M, f\) with f fixed, got \('.*', 4, 4\)"),
        (f"onnx:{tmp_path / 'no.onnx'}", "audio", "must be an ONNX graph with its weights inside the file"),
        (f"onnx:{tmp_path / 'none.onnx'}", "audio", "cannot be read"),
    ):
        with pytest.raises(TowerError, match=reason):
            open_tower(name, modality)  # type: ignore[arg-type]
