"""Folders of transformers models with a few thousand random weights, each with its own processor; no network."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error instead of a request, wherever a library still asks the hub; and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_TEXT = _SMALL | {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VISION = _SMALL | {"image_size": 32, "patch_size": 16}
_SPEECH = _SMALL | {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.5,
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
}
_CLAP = {
    "spec_size": 64,
    "num_mel_bins": 16,
    "hidden_size": 32,
    "patch_embeds_hidden_size": 16,
    "depths": [1, 1],
    "num_hidden_layers": 2,
    "num_attention_heads": [1, 2],
    "window_size": 4,
    "patch_size": 4,
    "patch_stride": (4, 4),
}
_PE = _SMALL | {"head_dim": 8}
_SQUARE = {"height": 32, "width": 32}
_CROP = {"size": {"shortest_edge": 36}, "crop_size": _SQUARE}


def _parts(kind: str) -> tuple[Any, list[Any]]:
    """The model and its processors."""
    import transformers as t

    if kind == "videomae":
        return t.VideoMAEModel(t.VideoMAEConfig(**_VISION, num_frames=4)), [t.VideoMAEImageProcessor(**_CROP)]
    if kind == "vjepa2":
        sizes = {
            f"{part}{name}": value
            for part in ("", "pred_")
            for name, value in (("hidden_size", 24), ("num_hidden_layers", 1), ("num_attention_heads", 2))
        }
        config = t.VJEPA2Config(crop_size=32, frames_per_clip=4, pred_num_mask_tokens=1, **sizes)
        return t.VJEPA2Model(config), [t.VJEPA2VideoProcessor(crop_size=32)]
    if kind == "clip":
        config = t.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8)
        return t.CLIPModel(config), [t.CLIPImageProcessor(**_CROP)]
    if kind == "siglip":
        return t.SiglipModel(t.SiglipConfig(text_config=_TEXT, vision_config=_VISION)), [
            t.SiglipImageProcessor(size=_SQUARE)
        ]
    if kind == "siglip2":
        vision = _SMALL | {"num_patches": 4, "patch_size": 16}
        return t.Siglip2Model(t.Siglip2Config(text_config=_TEXT, vision_config=vision)), [
            t.Siglip2ImageProcessor(patch_size=16, max_num_patches=4)
        ]
    if kind == "segformer":
        sizes = {"depths": [1], "sr_ratios": [1], "hidden_sizes": [16], "patch_sizes": [7], "strides": [4]}
        config = t.SegformerConfig(num_encoder_blocks=1, num_attention_heads=[2], mlp_ratios=[1], **sizes)
        return t.SegformerModel(config), [t.SegformerImageProcessor(size=_SQUARE)]
    if kind == "dinov2":
        sizes = {name: value for name, value in _VISION.items() if name != "intermediate_size"}
        return t.Dinov2Model(t.Dinov2Config(**sizes, mlp_ratio=1)), [t.BitImageProcessor(**_CROP)]
    if kind == "convnext":
        config = t.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
        return t.ConvNextModel(config), [t.ConvNextImageProcessor(size={"shortest_edge": 32})]
    if kind == "ast":
        config = t.ASTConfig(**_SMALL, max_length=64, num_mel_bins=32)
        return t.ASTModel(config), [t.ASTFeatureExtractor(max_length=64, num_mel_bins=32)]
    if kind in ("clap", "clap_fused"):
        is_fused = kind == "clap_fused"
        audio = _CLAP | {"enable_fusion": is_fused, "aff_block_r": 2}
        config = t.ClapConfig(text_config=_TEXT | {"pad_token_id": 1}, audio_config=audio, projection_dim=8)
        truncation = "fusion" if is_fused else "rand_trunc"
        extractor = t.ClapFeatureExtractor(feature_size=16, max_length_s=1, truncation=truncation)
        return t.ClapModel(config), [extractor]
    if kind in ("wav2vec2", "hubert", "wavlm", "data2vec"):
        letters = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "data2vec": "Data2VecAudio"}[kind]
        model = getattr(t, f"{letters}Model")(getattr(t, f"{letters}Config")(**_SPEECH))
        return model, [t.Wav2Vec2FeatureExtractor(do_normalize=kind != "wavlm")]
    assert kind == "pe_audio_video"
    dac = {"downsampling_ratios": [2, 8, 10, 12], "encoder_hidden_size": 2, "codebook_dim": 8, "hidden_size": 8}
    vision = {"architecture": "test_vit", "num_classes": 10, "model_args": {"img_size": 32}}
    config = t.PeAudioVideoConfig(
        text_config=_TEXT | {"hidden_size": 12, "cls_token_id": 1, "sep_token_id": 2},
        audio_video_config=_PE
        | {"audio_config": _PE | {"dac_config": dac}, "video_config": _PE | {"vision_config": vision}},
    )
    half = [0.5, 0.5, 0.5]
    videos = t.PeVideoVideoProcessor(
        size=_SQUARE, do_resize=True, do_rescale=True, do_normalize=True, image_mean=half, image_std=half
    )
    return t.PeAudioVideoModel(config), [t.PeAudioFeatureExtractor(), videos]


WORDS = ("a", "video", "of", "the", "sound", "dog", "rain", "red", "blue", "car", "barks", "falls", "loud", "quiet")


def _tokenizer(kind: str) -> Any:
    """Words of the vocabulary above, each text between a start and an end token; the end has the highest number."""
    import tokenizers as k
    import transformers as t

    names = ["<unk>", "<s>", *WORDS, "</s>"]
    names.insert(1 if kind.startswith("clap") else 0, "<pad>")
    vocabulary = {name: place for place, name in enumerate(names)}
    words = k.Tokenizer(k.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = k.pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("<s>", "</s>")]
    words.post_processor = k.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    inputs = ["input_ids"] if kind == "siglip" else ["input_ids", "attention_mask"]  # as in the published folders
    return t.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_input_names=inputs
    )


@pytest.fixture(scope="session")
def text_folder(hf_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """As `hf_folder`, with a tokenizer."""

    def folder(kind: str) -> Path:
        path = hf_folder(kind)
        _tokenizer(kind).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of model, by a short name; made at its first use."""
    root = tmp_path_factory.mktemp("hf")

    def folder(kind: str) -> Path:
        path = root / kind
        if not path.exists():
            with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
                torch.manual_seed(1)
                model, processors = _parts(kind)
                for part in (model, *processors):
                    part.save_pretrained(path)
        return path

    return folder
