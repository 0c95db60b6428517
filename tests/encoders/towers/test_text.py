"""Text sides against the library's own models, on token numbers written by hand."""

import contextlib
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
from torch.nn import functional

from cmacc.encoders.towers import (
    TextSides,
    TowerError,
    download_tower,
    has_text_side,
    open_text_tower,
    open_tower,
    tower_modality,
)

Folder = Callable[[str], Path]

WORDS = ("a", "video", "of", "the", "sound", "dog", "rain", "red", "blue", "car", "barks", "falls", "loud", "quiet")
TEXTS = ["a dog barks", "the loud rain falls", "a red car", "quiet", "the video of a blue car"]
# Kind, modality, width.
KINDS: list[tuple[str, Any, int]] = [
    ("clip", "video", 8),
    ("siglip", "video", 16),
    ("clap", "audio", 8),
    ("pe_audio_video", "video", 12),
    ("pe_audio_video", "audio", 12),
]


def ids_of(text: str, pad: int) -> Tensor:
    """Token numbers of one text, ``(1, n)``, by the order of the vocabulary in conftest.py."""
    names = ["<unk>", "<s>", *WORDS, "</s>"]
    names.insert(pad, "<pad>")
    return torch.tensor([[names.index(name) for name in ("<s>", *text.split(), "</s>")]])


@pytest.mark.parametrize(("kind", "modality", "width"), KINDS)
def test_texts_are_encoded_as_by_the_library(text_folder: Folder, kind: str, modality: Any, width: int) -> None:
    import transformers

    folder = text_folder(kind)
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    expected = []
    for text in TEXTS:
        ids = ids_of(text, pad=1 if kind == "clap" else 0)
        if kind == "siglip":  # trained on texts of one length, with the padding in sight
            padded = functional.pad(ids, (0, 64 - ids.shape[1]))
            expected.append(model.get_text_features(padded).pooler_output)
        elif kind == "pe_audio_video":
            part = getattr(model, f"{modality}_model")
            states = part.text_model(ids, output_hidden_states=True).hidden_states
            # What the head was trained on is the state before the last norm (Meta's `hidden_states[22]` of 22 layers).
            before: list[Tensor] = []
            hook = part.text_model.final_norm.register_forward_pre_hook(lambda _, args, seen=before: seen.append(*args))
            part.text_model(ids)
            hook.remove()
            assert states[-1].shape == before[0].shape
            expected.append(getattr(part, f"text_{modality}_head")(before[0][:, 0]))
        else:
            expected.append(model.get_text_features(ids).pooler_output)
    tower = open_text_tower(f"hf:{folder}", modality)
    got = tower.encode_text(TEXTS)
    assert got.shape == (len(TEXTS), width)
    torch.testing.assert_close(got, functional.normalize(torch.cat(expected), dim=1), atol=1e-5, rtol=1e-4)
    assert not got.requires_grad
    assert not any(weight.requires_grad for weight in tower.parameters())
    assert not any(module.training for module in tower.modules())
    own = {key.split(".")[1] for key in tower.state_dict()}
    assert own <= {"text_model", "text_projection", "text_video_head", "text_audio_head"}


@pytest.mark.parametrize("kind", ["clip", "siglip", "clap"])
def test_cosines_are_ranked_as_by_the_whole_model(text_folder: Folder, kind: str) -> None:
    """Through the whole of our side, pixels or waveforms included, against the library's logits."""
    import transformers

    folder = text_folder(kind)
    modality: Any = "audio" if kind == "clap" else "video"
    tower = open_tower(f"hf:{folder}", modality).eval()
    inputs = torch.rand(3, 40_000) - 0.5 if modality == "audio" else torch.randn(3, 3, 1, 32, 32)
    with torch.no_grad():
        features = tower(inputs)
    cosines = functional.normalize(features, dim=1) @ open_text_tower(f"hf:{folder}", modality).encode_text(TEXTS).T

    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    how = {"padding": "max_length", "max_length": 64} if kind == "siglip" else {"padding": True}
    texts = tokenizer(TEXTS, return_tensors="pt", **how)
    texts.pop("token_type_ids", None)
    with torch.no_grad():
        if modality == "audio":
            extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
            sounds = extractor(list(inputs.numpy()), sampling_rate=48_000, return_tensors="pt")
            logits = model(**texts, **sounds).logits_per_audio
            scale, shift = model.logit_scale_a.exp(), 0.0
        else:
            logits = model(**texts, pixel_values=tower.normalise(inputs)[:, :, 0]).logits_per_image  # type: ignore[operator]
            scale, shift = model.logit_scale.exp(), getattr(model, "logit_bias", 0.0)
    torch.testing.assert_close(cosines * scale + shift, logits, atol=1e-3, rtol=1e-4)
    assert torch.equal(cosines.argsort(dim=1), logits.argsort(dim=1))


def test_siglip_2_has_a_tokenizer_of_its_own(hf_folder: Folder) -> None:
    """The library makes lower case of all text, as in training, and it does so whatever the folder's tokenizer says."""
    import transformers

    folder = hf_folder("siglip2")
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁adog"])}
    transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right").save_pretrained(folder)
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([[vocabulary[letter] for letter in "▁a▁dog"[1:]]])
    padded = functional.pad(ids, (0, 64 - ids.shape[1]))
    mask = functional.pad(torch.ones_like(ids), (0, 64 - ids.shape[1]))
    expected = functional.normalize(model.get_text_features(padded, attention_mask=mask).pooler_output, dim=1)
    got = open_text_tower(f"hf:{folder}", "video").encode_text(["a dog", "A DoG"])
    torch.testing.assert_close(got, expected.expand(2, -1), atol=1e-5, rtol=1e-4)


def test_a_text_does_not_depend_on_the_others(text_folder: Folder) -> None:
    """More texts than are encoded at once, of different lengths."""
    tower = open_text_tower(f"hf:{text_folder('clip')}", "video")
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, size=1 + i % 9)) for i in range(130)]
    together = tower.encode_text(texts)
    for i in (0, 63, 64, 129):
        torch.testing.assert_close(together[i : i + 1], tower.encode_text([texts[i]]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(130))


@pytest.mark.parametrize(("kind", "limit"), [("clip", 77), ("siglip", 64), ("clap", 512)])
def test_a_text_is_refused_and_not_cut(text_folder: Folder, kind: str, limit: int) -> None:
    tower = open_text_tower(f"hf:{text_folder(kind)}", tower_modality(f"hf:{text_folder(kind)}"))
    assert tower.encode_text([" ".join(["dog"] * (limit - 2))]).isfinite().all()
    with pytest.raises(TowerError, match=rf"a text must have at most {limit} tokens, got {limit + 1} in 'dog dog"):
        tower.encode_text(["a dog", " ".join(["dog"] * (limit - 1))])
    with pytest.raises(TowerError, match="texts must be at least one, got none"):
        tower.encode_text([])


def test_which_towers_have_a_text_side(hf_folder: Folder, tmp_path: Path) -> None:
    sides = {kind: [m for m in ("video", "audio") if has_text_side(f"hf:{hf_folder(kind)}", m)] for kind, *_ in KINDS}
    assert sides == {
        "clip": ["video"], "siglip": ["video"], "clap": ["audio"],
        "pe_audio_video": ["video", "audio"],
    }  # fmt: skip
    for name in ("tiny", "timm:resnet18", "torchvision:r3d_18", f"hf:{hf_folder('videomae')}"):
        assert not has_text_side(name, "video")
    for file in ("config.json", "preprocessor_config.json"):  # what an export has of a tower
        shutil.copyfile(hf_folder("clip") / file, tmp_path / file)
    assert not has_text_side(f"hf:{tmp_path}", "video")
    with pytest.raises(TowerError, match="hf: model of clip, siglip, siglip2, pe_video, pe_audio_video, got videomae"):
        open_text_tower(f"hf:{hf_folder('videomae')}", "video")
    with pytest.raises(TowerError, match=r"with audio it must be an hf: model of clap, .*, got another kind of tower"):
        open_text_tower("timm:resnet18", "audio")
    with pytest.raises(TowerError, match=r"hf:owner/model: must be a folder, or a model of the hub .* --download"):
        has_text_side("hf:owner/model", "video")


def test_files_that_do_not_do(text_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(text_folder("clip"), folder)
    name = f"hf:{folder}"
    weights = load_file(folder / "model.safetensors")
    # The pictures' side is not needed, neither in memory nor in the file.
    own = {key: value for key, value in weights.items() if key.startswith("text_")}
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    assert open_text_tower(name, "video").encode_text(TEXTS).shape == (5, 8)
    save_file(
        {k: v for k, v in own.items() if k != "text_projection.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(TowerError, match=r"the weights lack text_projection\.weight"):
        open_text_tower(name, "video")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TowerError, match=r"must hold a tokenizer, one of .*tokenizer\.json.*, got none"):
        open_text_tower(name, "video")


def test_no_code_of_a_tokenizer_runs(text_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(text_folder("clip"), folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\nclass Own: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    told = settings | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    with contextlib.suppress(TowerError):
        open_text_tower(f"hf:{folder}", "video")
    assert not (tmp_path / "evil").exists()


def test_sides_are_opened_once(text_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = TextSides({"video": f"hf:{text_folder('clip')}", "audio": "tiny"})
    assert sides.modalities == ("video",)
    first = sides.encode(TEXTS, "video", torch.device("cpu"))
    monkeypatch.setattr("cmacc.encoders.towers.text.open_text_tower", lambda *_: pytest.fail("opened again"))
    assert torch.equal(sides.encode(TEXTS, "video", torch.device("cpu")), first)


def test_a_download_takes_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns))
    download_tower("hf:owner/model")
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
    assert all(any(fnmatch(file, pattern) for pattern in asked) for file in files)
