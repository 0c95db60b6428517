"""Towers of transformers against the library's own models and processors."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmacc.encoders.towers import TowerError, TowerInput, download_tower, open_tower, tower_files
from cmacc.encoders.towers.tower import PIXEL_DEVIATION, PIXEL_MEAN, Tower, VideoTower

Folder = Callable[[str], Path]

# Kind, size of the feature, number of frames, whether it takes whole clips.
VIDEO = [
    ("videomae", 16, 4, True),
    ("vjepa2", 24, 4, True),
    ("pe_audio_video", 12, None, True),
    ("clip", 8, None, False),
    ("siglip", 16, None, False),
    ("siglip2", 16, None, False),
    ("dinov2", 16, None, False),
    ("convnext", 16, None, False),
]
# Kind, size of the feature, sample rate.
AUDIO = [
    ("ast", 16, 16_000),
    ("clap", 8, 48_000),
    ("clap_fused", 8, 48_000),
    ("wav2vec2", 16, 16_000),
    ("hubert", 16, 16_000),
    ("wavlm", 16, 16_000),
    ("data2vec", 16, 16_000),
    ("pe_audio_video", 12, 48_000),
]


def normalised(frames: Tensor) -> Tensor:
    """cmacc's video of uint8 frames ``(M, T, H, W, 3)``, as `cmacc.clips.to_video` makes it."""
    return (frames.permute(0, 4, 1, 2, 3) / 255 - PIXEL_MEAN) / PIXEL_DEVIATION


def processed(folder: Path, frames: Tensor) -> Tensor:
    """What the folder's processor makes of uint8 frames of one clip ``(T, H, W, 3)``.

    Without resizing: some scale to 8/7 of the crop and then crop, but these frames have the size of the crop already.
    """
    import transformers

    if (folder / "video_preprocessor_config.json").exists():
        processor = transformers.AutoVideoProcessor.from_pretrained(folder)
        inputs = processor(videos=[frames.permute(0, 3, 1, 2)], return_tensors="pt", do_resize=False)
    else:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        inputs = processor([frame.numpy() for frame in frames], return_tensors="pt", do_resize=False)
    return next(iter(inputs.values())).reshape(-1)


@pytest.mark.parametrize(("kind", "size", "count", "takes_clips"), VIDEO)
def test_video_towers_give_what_the_library_gives(
    hf_folder: Folder, kind: str, size: int, count: int | None, takes_clips: bool
) -> None:
    import transformers

    folder = hf_folder(kind)
    tower = open_tower(f"hf:{folder}", "video").eval()
    assert isinstance(tower, VideoTower)
    assert tower.takes == TowerInput(frame_count=count, frame_height=32, frame_width=32)
    assert tower.feature_size == size
    assert (tower.pooling is None) == takes_clips
    assert tower.can_train
    frames = torch.randint(0, 256, (2, count or 3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        got = tower(normalised(frames))
    assert got.shape == (2, size)

    if kind == "siglip2":
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        inputs = [processor([frame.numpy() for frame in clip], return_tensors="pt") for clip in frames]
    else:
        ours = tower.normalise(normalised(frames)).transpose(1, 2)
        own = torch.stack([processed(folder, clip).reshape(ours.shape[1:]) for clip in frames])
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
        inputs = own
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind == "videomae":
            expected = model(pixel_values=inputs).last_hidden_state.mean(1)
        elif kind == "vjepa2":
            expected = model.get_vision_features(inputs).mean(1)
        elif kind == "pe_audio_video":
            expected = model.video_model.video_head(model.video_model.video_encoder(inputs).pooler_output)
        elif kind == "siglip2":
            expected = torch.stack([model.get_image_features(**clip).pooler_output.mean(0) for clip in inputs])
        elif kind in ("clip", "siglip"):
            expected = torch.stack([model.get_image_features(clip).pooler_output.mean(0) for clip in inputs])
        else:
            expected = torch.stack([model(clip).pooler_output.mean(0) for clip in inputs])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "size", "rate"), AUDIO)
def test_audio_towers_give_what_the_library_gives(hf_folder: Folder, kind: str, size: int, rate: int) -> None:
    import transformers

    folder = hf_folder(kind)
    tower = open_tower(f"hf:{folder}", "audio").eval()
    assert not isinstance(tower, VideoTower)
    assert tower.takes == TowerInput(sample_rate_hz=rate)
    assert tower.feature_size == size
    # Not a multiple of the hop of PE-AV, which pads.
    waveforms = (torch.rand(3, int(0.41 * rate)) * 2 - 1) * torch.tensor([[1.0], [0.1], [0.5]])
    seen: list[Tensor] = []
    entered = getattr(tower.network, "audio_encoder", tower.network)
    entered.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_values"]), with_kwargs=True)
    with torch.no_grad():
        got = tower(waveforms)
    assert got.shape == (3, size)
    torch.testing.assert_close(tower(waveforms[1:2]), got[1:2], atol=1e-5, rtol=1e-4)

    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor([waveform.numpy() for waveform in waveforms], sampling_rate=rate, return_tensors="pt")
    if not kind.startswith("clap"):  # whose network is entered by `get_audio_features`
        torch.testing.assert_close(seen[0], inputs["input_values"], atol=1e-5, rtol=0)
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind == "ast":
            expected = model(**inputs).pooler_output
        elif kind.startswith("clap"):
            # The library's extractor makes one clip of a batch pass as longer, drawn at random: a fused model mixes it.
            inputs["is_longer"] = torch.zeros_like(inputs["is_longer"])
            expected = model.get_audio_features(**inputs).pooler_output
        elif kind == "pe_audio_video":
            expected = model.get_audio_embeds(inputs["input_values"])
        else:
            expected = model(inputs["input_values"]).last_hidden_state.mean(1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clap", "clap_fused", "pe_audio_video"])
def test_what_a_tower_gives_before_it_projects_into_the_space_of_texts(hf_folder: Folder, kind: str) -> None:
    import transformers

    tower = open_tower(f"hf:{hf_folder(kind)}", "audio").eval()
    waveforms = torch.rand(3, 20_160) - 0.5  # a multiple of the hop of PE-AV
    extractor = transformers.AutoFeatureExtractor.from_pretrained(hf_folder(kind))
    inputs = extractor([waveform.numpy() for waveform in waveforms], sampling_rate=48_000, return_tensors="pt")
    model: Any = transformers.AutoModel.from_pretrained(hf_folder(kind)).eval()
    with torch.no_grad():
        before = tower.unprojected(waveforms)
        assert torch.equal(tower.project(before), tower(waveforms))
        if kind == "pe_audio_video":
            expected = model.audio_model.audio_encoder(inputs["input_values"]).pooler_output
        else:
            expected = model.audio_model(inputs["input_features"], torch.zeros(3, 1, dtype=torch.bool)).pooler_output
    assert before.shape[1] != tower.feature_size
    torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-4)


def test_a_tower_without_texts_projects_nothing(hf_folder: Folder) -> None:
    for kind, modality in (("ast", "audio"), ("clip", "video")):
        tower = open_tower(f"hf:{hf_folder(kind)}", modality)  # type: ignore[arg-type]
        assert not tower.has_projection
        for call in (tower.unprojected, tower.project):
            with pytest.raises(TowerError, match="must project into a space shared with text, got none"):
                call(torch.zeros(1, 16))


@pytest.mark.parametrize(
    ("kind", "modality"), [(kind, "video") for kind, *_ in VIDEO] + [(kind, "audio") for kind, *_ in AUDIO]
)
def test_it_trains_copies_and_loads(hf_folder: Folder, kind: str, modality: Any) -> None:
    """Every weight gets a gradient, but for those behind PE-AV's frozen codec; and a state dict is the whole tower."""
    name = f"hf:{hf_folder(kind)}"
    tower = open_tower(name, modality)
    if modality == "video":
        inputs = torch.randn(2, 3, tower.takes.frame_count or 3, 32, 32)
    else:
        inputs = torch.rand(2, 8000) - 0.5
    generator = torch.Generator().manual_seed(0)
    tower(inputs).mul(torch.randn(2, tower.feature_size, generator=generator)).sum().backward()
    idle = [key for key, weight in tower.named_parameters() if weight.grad is None]
    assert [key for key in idle if "dac_encoder" not in key and "bottleneck" not in key] == []
    tower.eval()
    with torch.no_grad():
        expected = tower(inputs)
        assert torch.equal(copy.deepcopy(tower)(inputs), expected)
        empty = open_tower(name, modality, with_weights=False).eval()
        assert not torch.allclose(empty(inputs), expected)
        empty.load_state_dict(tower.state_dict())
        assert torch.equal(empty(inputs), expected)


def test_training_masks_nothing(hf_folder: Folder) -> None:
    """Speech models are told to mask half the time; with it, features would change from call to call."""
    tower = open_tower(f"hf:{hf_folder('wav2vec2')}", "audio")
    waveforms = torch.rand(2, 8000) - 0.5
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(tower(waveforms), tower(waveforms))
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_too_long_audio_is_refused_and_not_cut(hf_folder: Folder) -> None:
    for kind, limit, rate in (("ast", "0.64", 16_000), ("clap", "1", 48_000)):
        tower = open_tower(f"hf:{hf_folder(kind)}", "audio")
        with pytest.raises(TowerError, match=rf"takes at most {limit} s of audio, got 1\.5 s"):
            tower(torch.zeros(1, rate * 3 // 2))


def test_files_and_weights(hf_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(hf_folder("clip"), folder)
    name = f"hf:{folder}"
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert tower_files(name) == [folder / file for file in names]

    weights = load_file(folder / "model.safetensors")
    key = "vision_model.post_layernorm.weight"
    # In memory, a text encoder is not needed; in the file neither.
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("text_")}, folder / "model.safetensors", {"format": "pt"}
    )
    tower = open_tower(name, "video")
    assert torch.equal(tower.network.state_dict()[key], weights[key])
    assert not any("text" in key for key in tower.state_dict())
    assert str(folder) not in str([vars(module) for module in tower.network.modules()])

    save_file({k: v for k, v in weights.items() if k != key}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TowerError, match=r"the weights lack vision_model\.post_layernorm\.weight"):
        open_tower(name, "video")
    save_file(weights | {key: torch.zeros(5)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TowerError, match=r"post_layernorm\.weight must have shape \(16,\), got \(5,\)"):
        open_tower(name, "video")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(TowerError, match="the weights cannot be read"):
        open_tower(name, "video")

    (folder / "model.safetensors").unlink()
    with pytest.raises(TowerError, match=r"must hold weights, model\.safetensors, got none"):
        open_tower(name, "video")
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(open_tower(name, "video").network.state_dict()[key], weights[key])
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/evil'\ntR.".encode())
    with pytest.raises(TowerError, match="the weights cannot be read"):
        open_tower(name, "video")
    assert not (tmp_path / "evil").exists()


def test_configs_that_do_not_do(hf_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(hf_folder("clip"), folder)
    name = f"hf:{folder}"
    with pytest.raises(
        TowerError, match=r"as an encoder of audio it must be one of audio-spectrogram-transformer, clap, .*, got clip"
    ):
        open_tower(name, "audio")
    config = json.loads((folder / "config.json").read_text())
    for change, reason in (
        ({"model_type": "bert"}, "as an encoder of video it must be one of videomae, vjepa2, .*, got bert"),
        ({"model_type": "vivit"}, "as an encoder of video it must be one of videomae, vjepa2, .*, got vivit"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "has no AutoConfig"),
        (
            {"vision_config": config["vision_config"] | {"attn_implementation": "a/b"}},
            "must not name something to fetch",
        ),
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}, "architecture in .* must not name something to"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TowerError, match=reason):
            open_tower(name, "video")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(TowerError, match="has no AutoImageProcessor"):
        open_tower(name, "video")
    (folder / "config.json").write_text("{")
    with pytest.raises(TowerError, match=r"config\.json cannot be read"):
        open_tower(name, "video")


def test_an_image_model_without_a_pooled_output(hf_folder: Folder) -> None:
    tower = open_tower(f"hf:{hf_folder('segformer')}", "video")
    with pytest.raises(TowerError, match="SegformerModel: must be a model with a pooled output, got one without"):
        tower(torch.randn(1, 3, 2, 32, 32))


def test_whole_clips_are_not_pooled(hf_folder: Folder) -> None:
    with pytest.raises(TowerError, match="frame pooling must be mean, because it takes whole clips, got 'attention'"):
        open_tower(f"hf:{hf_folder('videomae')}", "video", frame_pooling="attention")
    tower = open_tower(f"hf:{hf_folder('clip')}", "video", frame_pooling="attention")
    assert isinstance(tower, Tower)
    assert "pooling.query" in tower.state_dict()


def test_a_model_of_the_hub_is_not_fetched() -> None:
    for call in (lambda: open_tower("hf:owner/model", "video"), lambda: tower_files("hf:owner/model")):
        with pytest.raises(TowerError, match=r"hf:owner/model: must be a folder, or a model of the hub .* --download"):
            call()
    for name in ("hf:", "hf:../no/folder", "hf:/no/folder"):
        with pytest.raises(TowerError, match="must be a folder, or a model of the hub"):
            open_tower(name, "video")
    with pytest.raises(TowerError, match="hf:owner/model: cannot be downloaded"):
        download_tower("hf:owner/model")


def test_a_cached_model_is_opened_and_a_download_takes_no_code(
    hf_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fetched(model: str, **options: Any) -> str:
        asked.update(model=model, **options)
        return str(hf_folder("clip"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    download_tower("hf:owner/model")
    assert asked == {"model": "owner/model", "allow_patterns": ["*.json", "*.txt", "*.model", "*.safetensors"]}
    assert open_tower("hf:owner/model", "video").feature_size == 8
    assert asked["local_files_only"]
    asked.clear()
    for name in (f"hf:{hf_folder('clip')}", "timm:resnet18", "torchvision:r3d_18"):
        download_tower(name)
    assert not asked
