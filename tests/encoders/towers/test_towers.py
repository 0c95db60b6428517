"""What holds for towers of every kind: names, normalisation, pooling, weights, trust; and torchvision's and timm's."""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from cmacc.clips import to_video
from cmacc.clips.loading import transforms
from cmacc.encoders.momentum import momentum_copy, update_momentum
from cmacc.encoders.towers import FramePooling, TowerError, TowerInput, is_tower, open_tower, tower_files, trusting_code
from cmacc.encoders.towers.tower import PIXEL_DEVIATION, PIXEL_MEAN, VideoTower

IMAGES = TowerInput(frame_height=160, frame_width=160)


def opened(name: str, **options: Any) -> VideoTower:
    """A tower of video, in evaluation mode."""
    tower = open_tower(name, "video", **options).eval()
    assert isinstance(tower, VideoTower)
    return tower


def test_pixels_are_normalised_as_clips_are() -> None:
    assert (PIXEL_MEAN, PIXEL_DEVIATION) == (transforms._PIXEL_MEAN, transforms._PIXEL_DEVIATION)


def test_names() -> None:
    for name in ("torchvision:r3d_18", "timm:test_vit", "hf:a/b", "onnx:a.onnx", "python:a.b:c"):
        assert is_tower(name)
    for name in ("tiny", "r3d_18", "statistics", "runs/first", "torchvision", "onnx/a"):
        assert not is_tower(name)
    with pytest.raises(
        TowerError, match=r"tower r3d_18: must start with one of torchvision:, timm:, hf:, onnx:, python:"
    ):
        open_tower("r3d_18", "video")
    assert tower_files("torchvision:r3d_18") == tower_files("python:a:b") == []
    assert tower_files("timm:test_vit=a/w=1.pth") == [Path("a/w=1.pth")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision:vgg", r"torchvision:vgg: must be one of r3d_18, .*, resnet18"),
        ("torchvision:googlenet", r"torchvision:googlenet: must be one of"),
        ("torchvision:resnet18=", "WEIGHTS must be a file of weights, got nothing there"),
        ("torchvision:resnet18=no.pth", r"no\.pth must be a file of weights, got nothing there"),
        ("timm:resnet19", r"timm:resnet19: must be a model of timm's, such as resnet18"),
        ("timm:resnet18.no_tag", r"timm:resnet18\.no_tag: must be one of .*resnet18\.a1_in1k"),
        ("timm:hf-hub:timm/resnet18", r"must be a model of timm's own, got hf-hub:timm/resnet18"),
        ("timm:local-dir:/tmp", r"must be a model of timm's own, got local-dir:/tmp"),
    ],
)
def test_names_that_stand_for_nothing(name: str, reason: str) -> None:
    with pytest.raises(TowerError, match=reason):
        open_tower(name, "video")


def test_image_models_do_not_encode_audio() -> None:
    for name in ("torchvision:resnet18", "timm:test_vit"):
        with pytest.raises(TowerError, match="must encode audio, but the models of that library encode images"):
            open_tower(name, "audio")


@pytest.mark.parametrize(
    ("name", "size"), [("timm:test_vit", 64), ("timm:test_efficientnet", 256), ("timm:test_resnet.r160_in1k", 96)]
)
def test_timm_features_are_the_mean_over_frames_of_its_own(name: str, size: int) -> None:
    tower = opened(name)
    assert tower.takes == IMAGES
    assert tower.feature_size == size
    model = name.removeprefix("timm:")
    own = timm.create_model(model, pretrained=False, num_classes=0).eval()
    own.load_state_dict(tower.network.state_dict())
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(own)).transforms[-1]  # normalisation
    frames = torch.randint(0, 256, (2, 3, 160, 160, 3), dtype=torch.uint8)
    images = prepare(frames.flatten(0, 1).permute(0, 3, 1, 2) / 255)
    ours = tower.normalise(to_video(frames)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(ours, images, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(tower(to_video(frames)), own(images).view(2, 3, size).mean(1), atol=1e-5, rtol=1e-4)


def test_torchvision_images_are_normalised_as_by_its_own_preset() -> None:
    tower = opened("torchvision:resnet18")
    assert tower.takes == TowerInput(frame_height=224, frame_width=224)
    presets = torchvision.models.ResNet18_Weights.DEFAULT.transforms(crop_size=64, resize_size=64)
    frames = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    images = presets(frames.flatten(0, 1).permute(0, 3, 1, 2))
    torch.testing.assert_close(
        tower.normalise(to_video(frames)).transpose(1, 2).flatten(0, 1), images, atol=1e-5, rtol=0
    )
    own = torchvision.models.resnet18(weights=None).eval()
    own.load_state_dict(tower.network.state_dict(), strict=False)
    own.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(tower(to_video(frames)), own(images).view(2, 2, 512).mean(1), atol=1e-4, rtol=1e-4)


def test_torchvision_videos_are_taken_as_they_are() -> None:
    tower = opened("torchvision:r3d_18")
    assert tower.takes == TowerInput(16, 15.0, 112, 112)
    assert tower.pooling is None
    presets = torchvision.models.video.R3D_18_Weights.DEFAULT.transforms(crop_size=(32, 32), resize_size=(32, 32))
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    video = presets(frames.permute(0, 1, 4, 2, 3))
    torch.testing.assert_close(tower.normalise(to_video(frames)), video, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(tower(to_video(frames)), tower.network(video), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "classifier"), [("timm:test_vit", "head"), ("torchvision:shufflenet_v2_x0_5", "fc")])
def test_weights_come_from_a_file(tmp_path: Path, name: str, classifier: str) -> None:
    state = opened(name).network.state_dict()
    key = next(key for key, value in state.items() if value.ndim > 1)
    state = {k: (v + 0.01 if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    head = {f"{classifier}.weight": torch.zeros(5, 3), f"{classifier}.bias": torch.zeros(5)}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(state | head, tmp_path / "w.safetensors")
    torch.save(old, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        named = f"{name}={tmp_path / file}"
        assert torch.equal(opened(named).network.state_dict()[key], state[key])
        assert tower_files(named) == [tmp_path / file]
        assert not torch.equal(opened(named, with_weights=False).network.state_dict()[key], state[key])
    for change, reason in (
        ({k: v for k, v in state.items() if k != key}, f"the weights lack {re.escape(key)}"),
        (state | {"more": torch.zeros(1)}, "the weights' more has no place in that model"),
        (state | {key: torch.zeros(2)}, rf"{re.escape(key)} must have shape \(.*\), got \(2,\)"),
    ):
        save_file(change, tmp_path / "w.safetensors")
        with pytest.raises(TowerError, match=reason):
            opened(f"{name}={tmp_path / 'w.safetensors'}")
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(TowerError, match="must hold a state dict of tensors alone"):
        opened(f"{name}={tmp_path / 'w.pth'}")
    (tmp_path / "w.pth").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/evil'\ntR.".encode())
    with pytest.raises(TowerError, match=r"w\.pth cannot be read"):
        opened(f"{name}={tmp_path / 'w.pth'}")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_copies_and_state_dicts_are_the_whole_tower(pooling: Any) -> None:
    tower = opened("timm:test_efficientnet", frame_pooling=pooling)
    video = torch.randn(2, 3, 3, 32, 32)
    if tower.pooling is not None and tower.pooling.query is not None:
        nn.init.normal_(tower.pooling.query)
    with torch.no_grad():
        expected = tower(video)
        assert torch.equal(copy.deepcopy(tower)(video), expected)
        other = opened("timm:test_efficientnet", frame_pooling=pooling, with_weights=False)
        other.load_state_dict(tower.state_dict())
        assert torch.equal(other(video), expected)
        key_encoder = momentum_copy(tower)
        update_momentum(tower, key_encoder, 0.5)
        assert torch.allclose(key_encoder(video), expected, atol=1e-5)


def test_attention_starts_as_the_mean_and_learns_which_frames_count() -> None:
    features = torch.randn(3, 5, 8)
    assert not list(FramePooling(8, "mean").parameters())
    attention = FramePooling(8, "attention")
    torch.testing.assert_close(attention(features), features.mean(1))
    torch.testing.assert_close(FramePooling(8, "mean")(features), features.mean(1))
    attention(features).square().sum().backward()
    assert attention.query is not None
    assert attention.query.grad is not None
    assert attention.query.grad.abs().max() > 0
    with torch.no_grad():
        attention.query.copy_(1000 * features[1, 3])
    chosen = features[1, (features[1] @ features[1, 3]).argmax()]
    torch.testing.assert_close(attention(features)[1], chosen)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("timm:test_vit", "timm"), ("hf:a/b", "transformers")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(TowerError, match=r"needs the extra `towers`: pip install 'cmacc\[towers\]'"):
            open_tower(name, "video")


CODE = """
import torch
from cmacc.encoders.towers import TowerInput

class Frames(torch.nn.Module):
    takes = TowerInput(frame_count=4)
    feature_size = 6
    def forward(self, frames):
        self.seen = frames
        return frames.mean((2, 3, 4)).repeat(1, self.repeats)
    repeats = 2

class Wrong(Frames):
    repeats = 3

def sound():
    module = torch.nn.Linear(100, 7)
    module.takes, module.feature_size = TowerInput(sample_rate_hz=8000), 7
    return module

def nothing(): return 1
def bare(): return torch.nn.Linear(2, 3)
def sized():
    module = torch.nn.Linear(2, 3)
    module.takes, module.feature_size = TowerInput(), 0
    return module
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_tower.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_own_tower", raising=False)
    return "my_own_tower"


def test_code_runs_only_where_it_is_trusted(users_module: str) -> None:
    with pytest.raises(TowerError, match=r"would run the code of my_own_tower; if you trust it, pass --trust-code"):
        open_tower(f"python:{users_module}:Frames", "video")
    assert users_module not in sys.modules
    with trusting_code():
        open_tower(f"python:{users_module}:Frames", "video")
    with pytest.raises(TowerError, match="--trust-code"):
        open_tower(f"python:{users_module}:Frames", "video")


def test_a_users_own_module_gets_plain_frames_or_waveforms(users_module: str) -> None:
    with trusting_code():
        tower = open_tower(f"python:{users_module}:Frames", "video")
        sound = open_tower(f"python:{users_module}:sound", "audio")
    frames = torch.randint(0, 256, (2, 4, 5, 5, 3), dtype=torch.uint8)
    assert tower.takes == TowerInput(frame_count=4)
    assert tower(to_video(frames)).shape == (2, 6) == (2, tower.feature_size)
    seen = tower.network.seen
    assert isinstance(seen, Tensor)
    torch.testing.assert_close(seen, frames.permute(0, 4, 1, 2, 3) / 255, atol=1e-6, rtol=0)
    waveforms = torch.rand(3, 100)
    assert torch.equal(sound(waveforms), sound.network(waveforms))
    assert torch.equal(copy.deepcopy(sound)(waveforms), sound(waveforms))
    assert sound.takes == TowerInput(sample_rate_hz=8000)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nothing", r"must return a torch\.nn\.Module, got int"),
        ("bare", "takes must be a TowerInput, got None"),
        ("sized", "feature_size must be a positive int, got 0"),
        ("missing", r"cannot be imported \(.*missing.*\); is its folder on PYTHONPATH\?"),
    ],
)
def test_a_module_that_does_not_keep_the_contract(users_module: str, function: str, reason: str) -> None:
    with trusting_code(), pytest.raises(TowerError, match=reason):
        open_tower(f"python:{users_module}:{function}", "video")


def test_other_ways_to_fail_at_the_contract(users_module: str) -> None:
    with trusting_code():
        wrong = open_tower(f"python:{users_module}:Wrong", "video")
        for name in ("python:", "python:module", "python:module:", "python::function"):
            with pytest.raises(TowerError, match="must be python:PACKAGE"):
                open_tower(name, "video")
        with pytest.raises(TowerError, match="cannot be imported"):
            open_tower("python:no_such_module:function", "audio")
    with pytest.raises(TowerError, match=r"must give shape \(2, 6\) for inputs of shape .*, got \(2, 9\)"):
        wrong(torch.zeros(2, 3, 4, 5, 5))
