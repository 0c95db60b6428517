"""Text queries and zero-shot classification: planted spaces, a naive reference, and a small CLIP by every way in."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmacc.cli import main
from cmacc.clips import ClipSpec, Manifest
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.pretraining import PretrainConfig, TrainConfig
from cmacc.transfer import (
    CmaccEncoder,
    EncoderError,
    EvaluateOptions,
    Modality,
    ProtocolError,
    Rows,
    TaskError,
    encode_text,
    evaluate,
    open_encoder,
    text_modalities,
)
from cmacc.transfer.nearest import zero_shot
from cmacc.transfer.text import class_prompt

ONE_WINDOW = EvaluateOptions(windows=1, workers=0)


def labels_of(path: Path) -> list[str]:
    return Manifest.read(path).classes()


class Planted(nn.Module):
    """Hears the class of every file, and reads it in a text: both are the same random direction of that class."""

    modalities: tuple[Modality, ...] = ("audio",)
    text_modalities: tuple[Modality, ...] = ("audio",)
    spec = ClipSpec(frame_count=1, frame_rate_hz=1.0, frame_height=16, frame_width=16, audio_seconds=1.0)
    device = torch.device("cpu")

    def __init__(self, labels: Sequence[str], answers: dict[float, int] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.randn(len(labels), 16, generator=generator)
        self.labels = list(labels)
        self.answers = answers
        self.heard: list[float] = []
        self.read: list[str] = []

    def embed_video(self, frames: Tensor) -> Tensor:
        raise AssertionError("not asked for")

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        keys = waveforms.double().abs().sum(1).tolist()
        self.heard += keys
        if self.answers is None:
            return torch.zeros(len(keys), 16)
        return 3 * self.directions[[self.answers[key] for key in keys]]

    def encode_text(self, texts: Sequence[str], modality: Modality) -> Tensor:
        self.read += texts
        rows = [next(i for i, label in enumerate(self.labels) if label.replace("_", " ") in text) for text in texts]
        return 5 * self.directions[rows]


def heard(manifest: Path, tmp_path: Path) -> dict[float, int]:
    """The class of every held-out sound; a deaf encoder gets none right."""
    deaf = Planted(labels_of(manifest)).eval()
    card = evaluate(deaf, ["zero_shot"], manifest, tmp_path / "deaf", options=ONE_WINDOW)
    assert [row.value for row in card.results] == [0.0]  # all classes tie, which counts against it
    records = Manifest.read(manifest).records
    held_out = [record for record in records if record.split == "test"]
    classes = labels_of(manifest)
    return {key: classes.index(str(record.label)) for key, record in zip(deaf.heard, held_out, strict=True)}


def test_a_planted_space_is_read_exactly(small_world: Path, tmp_path: Path) -> None:
    answers = heard(small_world, tmp_path)
    assert len(answers) == 12
    labels = labels_of(small_world)
    for wrong in (0, 5):
        changed = answers | {key: (answers[key] + 1) % 4 for key in list(answers)[:wrong]}
        encoder = Planted(labels, changed).eval()
        card = evaluate(encoder, ["zero_shot"], small_world, tmp_path / str(wrong), options=ONE_WINDOW)
        (row,) = card.results
        assert (row.task, row.protocol, row.modality, row.metric) == ("zero_shot", "zero_shot", "audio", "accuracy")
        assert row.value == (12 - wrong) / 12
        assert (row.chance, row.count, row.untrained) == (0.25, 12, None)
        assert row.low <= row.value <= row.high
        assert row.settings == ("prompt=the sound of {}.",)
        assert list(row.by_split) == ["test"]
        assert encoder.read == [f"the sound of {label.replace('_', ' ')}." for label in labels]
        assert (card.data["zero_shot"].files, card.data["zero_shot"].classes) == (12, 4)
        assert "the sound of {}." in (tmp_path / str(wrong) / "card.md").read_text()


def test_own_prompts_are_used_and_told(small_world: Path, tmp_path: Path) -> None:
    labels = labels_of(small_world)
    encoder = Planted(labels, heard(small_world, tmp_path)).eval()
    options = dataclasses.replace(ONE_WINDOW, prompts=("{}", "I hear {}"))
    (row,) = evaluate(encoder, ["zero_shot"], small_world, tmp_path, options=options).results
    assert row.value == 1
    assert row.settings == ("prompt={}", "prompt=I hear {}")
    names = [label.replace("_", " ") for label in labels]
    assert encoder.read == [*names, *(f"I hear {name}" for name in names)]


def test_beside_the_probes_of_a_labelled_set(small_world: Path, tmp_path: Path) -> None:
    """As a protocol of another task: on the held-out files of its splits, and features of all files are shared."""
    held_out = heard(small_world, tmp_path)
    everything = Planted(labels_of(small_world)).eval()
    evaluate(everything, ["labelled"], small_world, tmp_path / "a", protocols=["knn"], options=ONE_WINDOW)
    indices = Manifest.read(small_world).label_indices()
    answers = dict(zip(everything.heard, indices, strict=True))
    assert answers.items() >= held_out.items()
    encoder = Planted(labels_of(small_world), answers).eval()
    card = evaluate(
        encoder, ["labelled"], small_world, tmp_path / "b", protocols=["zero_shot", "knn"], options=ONE_WINDOW
    )
    assert {(r.task, r.protocol, r.value, r.count) for r in card.results} == {
        ("labelled", "zero_shot", 1.0, 12), ("labelled", "knn", 1.0, 12),
    }  # fmt: skip
    assert len(encoder.heard) == 48


def test_files_without_training_part(small_world: Path, tmp_path: Path) -> None:
    records = [dataclasses.replace(record, split=None) for record in Manifest.read(small_world).records]
    path = tmp_path / "unsplit.parquet"
    Manifest(tuple(records)).write(path)
    encoder = Planted(labels_of(small_world)).eval()
    with pytest.raises(TaskError, match=r"must hold labelled files in split 'test', got none; .* or pass --all-files"):
        evaluate(encoder, ["zero_shot"], path, tmp_path, options=ONE_WINDOW)
    options = dataclasses.replace(ONE_WINDOW, all_files=True)
    (row,) = evaluate(encoder, ["zero_shot"], path, tmp_path / "all", options=options).results
    assert (row.count, list(row.by_split)) == (48, ["all"])
    Manifest(tuple(dataclasses.replace(record, label="a") for record in records)).write(path)
    with pytest.raises(TaskError, match="must hold at least 2 classes, got 1"):
        evaluate(encoder, ["zero_shot"], path, tmp_path, options=options)
    Manifest(tuple(dataclasses.replace(record, label=None) for record in records)).write(path)
    with pytest.raises(TaskError, match=r"must hold labelled files, got none; `cmacc scan` reads labels"):
        evaluate(encoder, ["zero_shot"], path, tmp_path, options=options)
    Manifest(tuple(dataclasses.replace(record, has_audio=False) for record in records)).write(path)
    with pytest.raises(TaskError, match="task zero_shot: all: no held-out file has audio and decodes"):
        evaluate(encoder, ["zero_shot"], path, tmp_path, options=options)


def naive(features: Any, labels: Any, texts: Any) -> tuple[list[bool], list[bool]]:
    """Top-1 and top-5 in plain loops over float64."""

    def unit(row: Any) -> Any:
        length = float(np.sqrt((row.astype(np.float64) ** 2).sum()))
        return row.astype(np.float64) / length

    classes = []
    for c in range(texts.shape[1]):
        total = np.zeros(texts.shape[2])
        for template in texts:
            total += unit(template[c])
        classes.append(unit(total / len(texts)))
    first, fifth = [], []
    for windows, label in zip(features, labels, strict=True):
        query = unit(windows.astype(np.float64).mean(0))
        scores = [float(query @ row) for row in classes]
        place = sorted(range(len(scores)), key=lambda c: -scores[c]).index(int(label))
        first.append(place == 0)
        fifth.append(place < 5)
    return first, fifth


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))
def test_prompts_are_averaged_as_by_a_naive_reference(templates: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Lengths that differ by template: without the first normalisation, the longest would win.
    texts = (
        rng.standard_normal((templates, classes, 6)) * 10.0 ** rng.integers(-2, 3, (templates, classes, 1))
    ).astype(np.float32)
    features = rng.standard_normal((20, 3, 6)).astype(np.float32)
    labels = rng.integers(0, classes, 20)
    found = {metric.name: metric for metric in zero_shot(Rows(features, labels, np.arange(20)), texts)}
    first, fifth = naive(features, labels, texts)
    assert found["accuracy"].per_item.tolist() == first
    assert found["accuracy"].chance == 1 / classes
    assert ("top-5" in found) == (classes > 5)
    if classes > 5:
        assert found["top-5"].per_item.tolist() == fifth
        assert found["top-5"].chance == 5 / classes


def test_chance_is_that_of_features_that_know_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = Rows(rng.standard_normal((4000, 1, 8)).astype(np.float32), rng.integers(0, 8, 4000), np.arange(4000))
    for metric in zero_shot(rows, rng.standard_normal((2, 8, 8)).astype(np.float32)):
        assert metric.value == pytest.approx(metric.chance, abs=0.03)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (np.ones((1, 3, 5), np.float32), r"texts: must have shape \(templates, classes, 4\), got \(1, 3, 5\)"),
        (np.ones((3, 4), np.float32), r"texts: must have shape .*, got \(3, 4\)"),
        (np.ones((0, 3, 4), np.float32), r"texts: must have shape .*, got \(0, 3, 4\)"),
        (np.full((1, 3, 4), np.nan, np.float32), "texts: must be finite"),
        (np.ones((1, 2, 4), np.float32), "test labels: must be below the 2 classes with a text, got 2"),
    ],
)
def test_what_texts_must_be(texts: Any, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        zero_shot(Rows(np.ones((3, 1, 4), np.float32), np.arange(3), np.arange(3)), texts)


def test_names_of_classes_become_words() -> None:
    for label, words in (
        ("pouring_water", "pouring water"),
        ("HandstandPushups", "Handstand Pushups"),
        ("TaiChi", "Tai Chi"),
        ("TV", "TV"),
        ("{}", "{}"),
    ):
        assert class_prompt("a {}, or {}", label) == f"a {words}, or {words}"


@pytest.mark.usefixtures("users_checks")
def test_what_is_refused(small_world: Path, tmp_path: Path) -> None:
    encoder = Planted(labels_of(small_world)).eval()

    def fails(reason: str, who: Any = encoder, task: Any = "zero_shot", protocols: Any = (), **changes: Any) -> None:
        with pytest.raises(TaskError, match=reason):
            evaluate(
                who, [task], small_world, tmp_path,
                protocols=protocols, options=dataclasses.replace(ONE_WINDOW, **changes),
            )  # fmt: skip

    fails(r"--prompts must hold \{\} for the name of the class, got 'a dog'", prompts=("a dog",))
    fails("--prompts is for protocol zero_shot alone, got labelled", task="labelled", prompts=("{}",))
    fails("task zero_shot: protocol must be one of zero_shot, got knn", protocols=["knn"])
    fails("--folds is for task labelled alone, got zero_shot", folds=2)
    without = r"must have a text side in the space of its audio features, got LogMelStatistics without; hf: towers of"
    fails(without, who="statistics")
    fails(without, who="statistics", task="labelled", protocols=["knn", "zero_shot"])
    fails("space of its video or audio features, got CmaccEncoder without", who="random")
    with pytest.raises(EncoderError, match="must have a text side in the space of its video features, got none; hf:"):
        encode_text(encoder, ["rain"], "video")
    encoder.encode_text = lambda texts, modality: torch.full((len(texts), 16), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(EncoderError, match="encode_text must give a finite row for each of 2 texts, got shape"):
        encode_text(encoder, ["rain", "dog"], "audio")


@pytest.fixture(scope="module")
def clip(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a CLIP of random weights, with the words of the small world and of the prompt."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    words = ["a", "video", "of", "."] + [word for label in labels_of(small_world) for word in label.split("_")]
    names = list(dict.fromkeys(["<pad>", "<unk>", *words, "</s>"]))
    vocabulary = {name: place for place, name in enumerate(names)}
    reader = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    reader.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=reader, pad_token="<pad>").save_pretrained(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": len(names), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.CLIPModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


def test_clip_alone_from_the_command_line(clip: Path, small_world: Path, tmp_path: Path, capsys: Any) -> None:
    """The card's accuracy against the library's own model on the same frames."""
    import transformers

    arguments = ["evaluate", f"hf:{clip}", "--task", "zero_shot", "--data", str(small_world), "--workers", "0"]
    arguments += ["--windows", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "card")]
    assert main(arguments) == 0
    assert "zero_shot" in capsys.readouterr().out
    plain = json.loads((tmp_path / "card" / "card.json").read_text())
    (row,) = plain["results"]
    assert (row["modality"], row["settings"]) == ("video", ["prompt=a video of {}."])
    assert plain["encoder"]["clip"]["frame_height"] == 32
    assert plain["encoder"]["kind"] == f"transformers' {clip}"

    from cmacc.clips import evaluation_loader, evaluation_requests

    manifest = Manifest.read(small_world)
    held_out = manifest.ids_where(lambda record: record.split == "test")
    encoder = open_encoder(f"hf:{clip}").encoder
    requests = evaluation_requests(manifest, held_out, encoder.spec.length_seconds, 1)
    (batch,) = evaluation_loader(manifest, requests, encoder.spec, batch_size=12, workers=0)
    model: Any = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    prompts = [f"a video of {label.replace('_', ' ')}." for label in labels_of(small_world)]
    with torch.inference_mode():
        texts = model.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt")).pooler_output
        right = []
        for frames, i in zip(batch.frames, held_out, strict=True):
            pixels = processor(list(frames.numpy()), return_tensors="pt")["pixel_values"]
            image = model.get_image_features(pixels).pooler_output.mean(0)
            best = int(torch.cosine_similarity(image[None], texts).argmax())
            right.append(best == manifest.label_indices()[i])
    assert row["value"] == pytest.approx(np.mean(right))

    arguments[-1] = str(tmp_path / "other")
    assert main([*arguments, "--prompts", "no place"]) == 2
    assert "--prompts must hold {}" in capsys.readouterr().err


def test_text_of_a_run_with_a_tower(clip: Path, small_config: PretrainConfig) -> None:
    """The same as of the tower alone, if that was frozen; the hash of the weights does not depend on it."""
    from cmacc.transfer import weights_hash

    trained = dataclasses.replace(small_config, encoder=EncoderConfig(video=f"hf:{clip}", mel_bins=32, hidden_size=8))
    assert text_modalities(CmaccEncoder.of_run(trained, AudioVisualEncoder(trained.encoder)).eval()) == ()
    config = dataclasses.replace(trained, train=TrainConfig(video="head"))
    encoder = CmaccEncoder.of_run(config, AudioVisualEncoder(config.encoder)).eval()
    before = weights_hash(encoder)
    assert text_modalities(encoder) == ("video",)
    alone = open_encoder(f"hf:{clip}")
    assert text_modalities(alone.encoder) == ("video",)
    assert alone.untrained is None
    prompts = ["a video of .", "video"]
    found = encode_text(encoder, prompts, "video")
    assert torch.equal(found, encode_text(alone.encoder, prompts, "video"))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert weights_hash(encoder) == before
    with pytest.raises(EncoderError, match="in the space of its audio features, got none"):
        encode_text(encoder, prompts, "audio")
    assert text_modalities(open_encoder("random").encoder) == ()


def test_towers_alone(clip: Path) -> None:
    """Image models of any library are encoders of video; features are those of the tower."""
    for name, width in ((f"hf:{clip}", 8), ("timm:test_vit", 64)):
        opened = open_encoder(name, seed=1)
        assert opened.encoder.modalities == ("video",)
        spec = opened.encoder.spec
        frames = torch.zeros(1, 2, spec.frame_height, spec.frame_width, 3, dtype=torch.uint8)
        with torch.inference_mode():
            assert opened.encoder.embed_video(frames).shape == (1, width)
        assert open_encoder(name, seed=1).facts.weights == opened.facts.weights
    with pytest.raises(EncoderError, match=r"hf:owner/model: must be a folder, or a model of the hub in the local"):
        open_encoder("hf:owner/model")
