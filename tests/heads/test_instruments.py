"""Task ``instruments`` from tones to a card: encoders of two planted towers, of which one part is weak."""

import dataclasses
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmacc.clips import ClipSpec
from cmacc.heads.instrument_files import PROMPTS, instruments_task
from cmacc.heads.instrument_ontology import instrument_named
from cmacc.transfer import Card, EvaluateOptions, Modality, evaluate, losses_in_words
from cmacc.transfer.tasks import Split, TaskData

CLASSES = ("bassoon", "cello", "flute", "oboe", "theremin", "viola", "violin")  # no ontology knows the theremin
FILES = 4
WIDTH = 32
RATE_HZ = 8_000
STEP_HZ = 100  # file n has a tone of n + 1 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    folder = tmp_path_factory.mktemp("tones")
    for number in range(len(CLASSES) * FILES):
        path = folder / CLASSES[number // FILES] / f"{number % FILES}.wav"
        path.parent.mkdir(exist_ok=True)
        tone = np.sin(2 * np.pi * STEP_HZ * (number + 1) * np.arange(RATE_HZ) / RATE_HZ)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
            file.writeframes((10_000 * tone).astype("<i2").tobytes())
    return instruments_task(folder, folds=2, workers=0)


def planted() -> Tensor:
    """A direction of each class, as the sum of directions of its nodes in the tree: the nearer, the more they share."""
    found = [instrument_named(name) for name in CLASSES]
    paths = [("unknown", name) if one is None else (*one.path, name) for name, one in zip(CLASSES, found, strict=True)]
    nodes = sorted({path[:depth] for path in paths for depth in range(1, len(path) + 1)})
    return torch.tensor([[float(path[: len(node)] == node) for node in nodes] for path in paths])


class Listener(nn.Module):
    """The audio tower: hears which file a tone is of, and gives the direction of its class, and a little noise."""

    modalities: tuple[Modality, ...] = ("audio",)
    spec = ClipSpec(
        frame_count=1, frame_rate_hz=1.0, frame_height=16, frame_width=16, audio_seconds=1.0, sample_rate_hz=RATE_HZ
    )
    device = torch.device("cpu")

    def __init__(self, directions: Tensor) -> None:
        super().__init__()
        self.directions = directions
        self.heard: list[int] = []

    def embed_video(self, frames: Tensor) -> Tensor:
        raise AssertionError("it has no eyes")

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        files = (torch.fft.rfft(waveforms).abs().argmax(1) / STEP_HZ).round().int() - 1
        self.heard += files.tolist()
        noise = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(n))) for n in files])
        return self.directions[files // FILES] + 0.1 * noise


class TwoTowers(Listener):
    """Sounds and texts in one space: a projection of the audio tower, and a row of texts for each class."""

    text_modalities: tuple[Modality, ...] = ("audio",)

    def __init__(self, tower: Listener, projection: Tensor, texts: Tensor) -> None:
        super().__init__(tower.directions)
        self.unprojected, self.projection, self.texts = tower, projection, texts

    def project_audio(self, unprojected: Tensor) -> Tensor:
        return unprojected @ self.projection

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return self.project_audio(self.unprojected.embed_audio(waveforms))

    def encode_text(self, texts: Sequence[str], modality: Modality) -> Tensor:
        # The longest name: "violin" is also in a text with "viola" and "violin".
        named = [max((name for name in CLASSES if name in text), key=len) for text in texts]
        return self.texts[[CLASSES.index(name) for name in named]]


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """What is right: directions that the tower gives, a projection that keeps cosines, and texts beside the sounds."""
    nodes = planted()
    directions = torch.zeros(len(CLASSES), WIDTH)
    directions[:, : nodes.shape[1]] = nodes
    projection = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    return directions, projection, directions @ projection


def measured(
    data: TaskData, encoder: Listener | str, out: Path, **changes: object
) -> tuple[Card, dict[tuple[str, str, str], float]]:
    options = dataclasses.replace(EvaluateOptions(windows=1, workers=0), **changes)  # type: ignore[arg-type]
    given = encoder if isinstance(encoder, str) else encoder.eval()
    card = evaluate(given, ["instruments"], Path(), out, options=options, prepared={"instruments": data})
    return card, {(row.protocol, row.modality, row.metric): row.value for row in card.results}


def test_towers_without_fault(data: TaskData, tmp_path: Path) -> None:
    directions, projection, texts = parts()
    encoder = TwoTowers(Listener(directions), projection, texts)
    card, values = measured(data, encoder, tmp_path)
    assert list(values) == [
        ("linear", "audio", "accuracy"),
        ("knn", "audio", "accuracy"),
        ("prototypes", "audio_tower", "accuracy"),
        ("prototypes", "audio_tower", "triplets"),
        ("prototypes", "audio", "accuracy"),
        ("prototypes", "audio", "triplets"),
        ("zero_shot", "audio", "accuracy"),
        ("zero_shot", "audio", "top-5"),
        ("zero_shot", "audio_text", "triplets"),
    ]
    assert set(values.values()) == {1.0}
    assert sorted(encoder.unprojected.heard) == list(range(28))  # once, for all protocols
    for row in card.results:
        is_order = row.metric == "triplets"
        # 3 winds and 3 strings: each is nearer to 2 of its family than to 3 others, which makes 36 triplets; and oboe
        # and bassoon are nearer to each other than to the flute.
        assert (row.count, list(row.by_split)) == ((38, ["all"]) if is_order else (28, ["fold 1", "fold 2"]))
        assert row.settings == (tuple(f"prompt={text}" for text in PROMPTS) if row.protocol == "zero_shot" else ())
        if row.protocol in ("prototypes", "zero_shot") and row.metric != "top-5":
            assert row.chance == (0.5 if is_order else 1 / 7)
    assert losses_in_words(card) == [
        "instruments, audio: lost in the projection: 0.0 points (audio_tower 100.0 %, audio 100.0 %; their intervals "
        "overlap); lost in the text: 0.0 points (audio 100.0 %, zero_shot 100.0 %; their intervals overlap)"
    ]
    assert "lost in the text: 0.0 points" in (tmp_path / "card.md").read_text()


def test_the_card_shows_which_part_is_weak(data: TaskData, tmp_path: Path) -> None:
    directions, projection, texts = parts()
    shuffled = texts[[3, 6, 1, 4, 2, 0, 5]]
    noise = torch.randn(len(CLASSES), WIDTH, generator=torch.Generator().manual_seed(1))
    narrow = projection * (torch.arange(WIDTH) < 1)  # all but one dimension are lost
    weak = {
        "text": TwoTowers(Listener(directions), projection, shuffled),
        "projection": TwoTowers(Listener(directions), narrow, directions @ narrow),
        "audio": TwoTowers(Listener(0 * directions), projection, texts),
        "order": TwoTowers(Listener(noise), projection, noise @ projection),
    }
    found = {name: measured(data, encoder, tmp_path / name)[1] for name, encoder in weak.items()}
    sound, own = ("prototypes", "audio_tower"), ("prototypes", "audio")
    text = found["text"]
    assert text[(*sound, "accuracy")] == text[(*own, "accuracy")] == text[(*own, "triplets")] == 1
    assert text["zero_shot", "audio", "accuracy"] == 0
    assert text["zero_shot", "audio_text", "triplets"] < 0.75
    projected = found["projection"]
    assert projected[(*sound, "accuracy")] == 1
    assert projected[(*own, "accuracy")] < 0.5
    audio = found["audio"]
    assert audio[(*sound, "accuracy")] < 0.4
    assert audio["zero_shot", "audio", "accuracy"] < 0.4
    assert audio["zero_shot", "audio_text", "triplets"] == 1
    order = found["order"]  # classes are told apart, but do not lie as in the tree
    assert order[(*own, "accuracy")] == order["zero_shot", "audio", "accuracy"] == 1
    assert order[(*own, "triplets")] == order["zero_shot", "audio_text", "triplets"] < 0.75


def test_without_text_or_projection(data: TaskData, tmp_path: Path) -> None:
    card, values = measured(data, Listener(parts()[0]), tmp_path)
    assert {(protocol, modality) for protocol, modality, _ in values} == {
        (protocol, "audio") for protocol in ("linear", "knn", "prototypes")
    }
    assert losses_in_words(card) == []


def test_own_prompts_and_names_that_no_tree_has(data: TaskData, tmp_path: Path) -> None:
    directions, projection, texts = parts()
    encoder = TwoTowers(Listener(directions), projection, texts)
    unknown = dataclasses.replace(data, triplets=data.triplets[:0])
    card, values = measured(unknown, encoder, tmp_path, prompts=("no {}",))
    assert not any(metric == "triplets" for *_, metric in values)
    assert {row.settings for row in card.results} == {(), ("prompt=no {}",)}


def test_a_class_without_files_is_in_no_triplet(data: TaskData, tmp_path: Path) -> None:
    present = {i for i, record in enumerate(data.manifest.records) if record.label != "flute"}
    splits = tuple(
        Split(split.name, *(tuple(i for i in ids if i in present) for ids in (split.train, split.test)))
        for split in data.splits
    )
    card, _ = measured(dataclasses.replace(data, splits=splits), Listener(parts()[0]), tmp_path)
    (row,) = (row for row in card.results if row.metric == "triplets")
    assert (row.count, row.value) == (2 * 1 * 3 + 3 * 2 * 2, 1.0)  # reeds against strings, strings against reeds
