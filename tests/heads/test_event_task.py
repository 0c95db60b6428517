"""From films or published features to a card: against numbers worked out from the files and the predictions."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cmacc.clips import ClipSpec
from cmacc.clips.synthetic import WorldConfig, write_localised_world
from cmacc.heads import event_task as evaluation
from cmacc.heads.cace_net import CaceNet, CaceNetConfig
from cmacc.heads.cmbs import Cmbs, CmbsConfig, WeakCmbs, WeakCmbsConfig
from cmacc.heads.event_attention import StreamConfig
from cmacc.heads.event_items import published_set
from cmacc.heads.event_recipes import EVENT_RECIPES, EventProtocol
from cmacc.heads.event_results import AUROCS
from cmacc.heads.event_task import AVE_TASK, EventOptions, evaluate_events, features_facts
from cmacc.heads.head import ItemsInMemory
from cmacc.pretraining.clip_encoder import EncoderError, Modality
from cmacc.transfer import PUBLISHED_TASKS, Card, CardError, TaskError, published_results
from cmacc.transfer.compare import compared
from cmacc.transfer.metrics import DECIMALS
from cmacc.transfer.open import OpenedEncoder, opened_object

SMALL = StreamConfig(8, 8, 8, 8, 1, 8, 8, 2, 2)
BUILT: dict[EventProtocol, Callable[[int, int, int], Any]] = {
    "cmbs": lambda *sizes: Cmbs(*sizes, CmbsConfig(streams=SMALL)),
    "cace_net": lambda *sizes: CaceNet(*sizes, CaceNetConfig(base=CmbsConfig(streams=SMALL))),
    "cmbs_weak": lambda *sizes: WeakCmbs(*sizes, WeakCmbsConfig(streams=SMALL)),
}


@pytest.fixture(autouse=True)
def _small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, build in BUILT.items():
        monkeypatch.setitem(EVENT_RECIPES, name, dataclasses.replace(EVENT_RECIPES[name], build=build))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WorldConfig(clip_count=12, class_count=6, frame_size=32, frame_rate_hz=8, sample_rate_hz=8000)
    return write_localised_world(config, tmp_path_factory.mktemp("ave"), workers=1)


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> EventOptions:
    """Options with a cache for all tests: films are examined and decoded once for each encoder."""
    return EventOptions(seeds=(3, 1), epochs=2, workers=0, cache=tmp_path_factory.mktemp("cache"))


class Pooled(nn.Module):
    """The picture in 4 x 4 places, and the loudness of 8 parts of the sound, both through random weights."""

    modalities: tuple[Modality, ...] = ("video", "audio")
    spec = ClipSpec(
        frame_count=2, frame_rate_hz=2.0, frame_height=16, frame_width=16, audio_seconds=1.0, sample_rate_hz=8000
    )
    device = torch.device("cpu")

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("video_weights", torch.randn(48, 6, generator=generator))
        self.register_buffer("audio_weights", torch.randn(8, 5, generator=generator))

    def embed_video(self, frames: Tensor) -> Tensor:
        places = nn.functional.avg_pool2d(frames.float().mean(1).movedim(-1, 1), 4).flatten(1)
        features: Tensor = places / 255 @ self.video_weights
        return features

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        features: Tensor = waveforms.unflatten(1, (8, -1)).square().mean(2).sqrt() @ self.audio_weights
        return features


def truth(world: Path, split: str) -> list[list[str]]:
    """Class of each second by the text of the lists, in the order of the annotations; empty for background."""
    listed = set((world / f"{split}Set.txt").read_text().split("\n"))
    lines = [line for line in (world / "Annotations.txt").read_text().split("\n") if line and line in listed]
    fields = [line.split("&") for line in lines]
    return [[f[0] if int(f[3]) <= t < int(f[4]) else "" for t in range(10)] for f in fields]


def shared(world: Path, folder: Path, without: str) -> Path:
    """The same world without a film."""
    for path in world.rglob("*"):
        if path.is_file() and path.stem != without:
            (folder / path.name).hardlink_to(path)
    return folder


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, int], dict[str, Tensor]]]:
    """What the heads predict for the test part, by protocol and seed."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    before = evaluation._predicted

    def noted(events: Any, recipe: Any, training: Any, *rest: Any) -> dict[str, Tensor]:
        found[recipe.name, training.seed] = before(events, recipe, training, *rest)
        return found[recipe.name, training.seed]

    monkeypatch.setattr(evaluation, "_predicted", noted)
    return found


def test_the_rows_of_the_card(
    world: Path, two_seeds: EventOptions, tmp_path: Path, predicted: dict[tuple[str, int], dict[str, Tensor]]
) -> None:
    names: tuple[EventProtocol, ...] = ("linear", "cmbs", "cmbs_weak")
    card = evaluate_events(Pooled().eval(), world, tmp_path, protocols=names, options=two_seeds)
    assert Card.read(tmp_path / "card.json") == card
    assert "gate AUROC" in (tmp_path / "card.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"card.json", "card.md"}
    assert [(row.protocol, row.metric) for row in card.results] == [
        ("linear", "accuracy"), ("linear", "event AUROC"), ("cmbs", "accuracy"), ("cmbs", "event AUROC"),
        ("cmbs", "gate AUROC"), ("cmbs_weak", "accuracy"), ("cmbs_weak", "event AUROC"), ("cmbs_weak", "gate AUROC"),
    ]  # fmt: skip
    lines = (world / "Annotations.txt").read_text().splitlines()
    classes = [*dict.fromkeys(line.split("&")[0] for line in lines), ""]
    labels = np.asarray([[classes.index(name) for name in film] for film in truth(world, "test")])
    background = len(classes) - 1
    for row in card.results:
        assert (row.task, row.modality, row.version, row.count, row.untrained) == ("ave", "both", 1, 2, None)
        assert list(row.by_split) == ["seed 3", "seed 1"]
        for seed, value in zip((3, 1), row.by_split.values(), strict=True):
            of_seed = predicted[row.protocol, seed]
            expected = (of_seed["classes"].numpy() == labels).mean()
            if "AUROC" in row.metric:
                scores = of_seed["gates" if row.metric == "gate AUROC" else "event"]
                expected = roc_auc_score((labels != background).flatten(), scores.numpy().flatten())
            assert value == pytest.approx(expected)
        assert row.value == pytest.approx(np.mean(list(row.by_split.values())))
        assert row.low <= row.value <= row.high
        assert row.chance == (0.5 if "AUROC" in row.metric else pytest.approx((labels == background).mean()))
        ceiling = f"ceiling={100 * (labels != background).mean():.1f} %"
        weak = ("training videos without events=0",) if row.protocol == "cmbs_weak" else ()
        assert row.settings == ("epochs=2", ceiling, "annotations=not as published", *weak)
    facts = card.data["ave"]
    assert (facts.files, facts.files_listed, facts.classes, facts.classes_listed) == (12, 12, 6, 6)
    compared([card, card], ["a", "b"])  # refuses what is there twice, or unlike


def test_a_stopped_evaluation_goes_on(world: Path, two_seeds: EventOptions, tmp_path: Path) -> None:
    names: tuple[EventProtocol, ...] = ("linear", "cace_net")
    whole = evaluate_events(Pooled().eval(), world, tmp_path / "whole", protocols=names, options=two_seeds)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("ave, cace_net, seed 3, epoch", 1):
            raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        evaluate_events(Pooled().eval(), world, out, protocols=names, options=two_seeds, progress=stop)
    assert not (out / "card.json").exists()
    trained: list[tuple[str, int]] = []
    evaluate_events(
        Pooled(seed=1).eval(), world, out, protocols=names[:1], options=two_seeds,
        progress=lambda what, done, total: trained.append((what, done)),
    )  # fmt: skip
    # Another encoder has nothing to go on from, and leaves the state of the first.
    assert [(what, done) for what, done in trained if "epoch" in what] == [
        (f"ave, linear, seed {seed}, epoch", done) for seed in (3, 1) for done in (1, 2)
    ]
    (out / "card.json").unlink()
    trained.clear()
    again = evaluate_events(
        Pooled().eval(), world, out, protocols=names, options=two_seeds,
        progress=lambda what, done, total: trained.append((what, done)),
    )  # fmt: skip
    assert [(what, done) for what, done in trained if "epoch" in what] == [
        ("ave, cace_net, seed 3, epoch", 2),
        ("ave, cace_net, seed 1, epoch", 1),
        ("ave, cace_net, seed 1, epoch", 2),
    ]
    assert [dataclasses.replace(row, seconds=0.0) for row in again.results] == [
        dataclasses.replace(row, seconds=0.0) for row in whole.results
    ]
    assert not (out / "heads").exists()


def test_results_are_joined_and_never_lost_unasked(world: Path, two_seeds: EventOptions, tmp_path: Path) -> None:
    def run(options: EventOptions = two_seeds, seed: int = 0, overwrite: bool = False) -> Card:
        encoder = Pooled(seed).eval()
        return evaluate_events(encoder, world, tmp_path, protocols=["linear"], options=options, overwrite=overwrite)

    run()
    card = evaluate_events(Pooled().eval(), world, tmp_path, protocols=["linear_weak"], options=two_seeds)
    assert list(dict.fromkeys(row.protocol for row in card.results)) == ["linear", "linear_weak"]
    before = (tmp_path / "card.json").read_bytes()
    with pytest.raises(CardError, match="holds linear of task ave already"):
        run()
    with pytest.raises(CardError, match="may be of other weights than Pooled"):
        run(seed=1)
    assert (tmp_path / "card.json").read_bytes() == before
    card = run(dataclasses.replace(two_seeds, seeds=(5,)), overwrite=True)
    assert [(row.protocol, list(row.by_split)) for row in card.results if row.metric == "accuracy"] == [
        ("linear_weak", ["seed 3", "seed 1"]), ("linear", ["seed 5"]),
    ]  # fmt: skip


def test_beside_the_untrained_encoder(
    world: Path, two_seeds: EventOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(two_seeds, seeds=(0,))
    alone = evaluate_events(Pooled(1).eval(), world, tmp_path / "a", protocols=["cmbs"], options=options)

    def opened(encoder: Pooled) -> OpenedEncoder:
        return dataclasses.replace(opened_object(encoder), untrained=Pooled(1).eval())

    monkeypatch.setattr(evaluation, "opened_object", opened)
    card = evaluate_events(Pooled().eval(), world, tmp_path / "b", protocols=["cmbs"], options=options)
    assert [row.untrained for row in card.results] == [row.value for row in alone.results]
    assert not (tmp_path / "b" / "heads").exists()
    options = dataclasses.replace(options, with_untrained=False)
    card = evaluate_events(Pooled().eval(), world, tmp_path / "c", protocols=["cmbs"], options=options)
    assert [row.untrained for row in card.results] == [None] * 3


def test_a_missing_film_is_told(world: Path, two_seeds: EventOptions, tmp_path: Path) -> None:
    name = (world / "testSet.txt").read_text().split("&")[1]
    (tmp_path / "data").mkdir()
    data = shared(world, tmp_path / "data", without=name)
    (data / f"{name}.mp4").write_bytes(b"cut off")
    with pytest.raises(TaskError, match=f"got 1 that are not so, the first is {name}.mp4: "):
        evaluate_events(Pooled().eval(), data, tmp_path / "card", protocols=["linear"], options=two_seeds)
    options = dataclasses.replace(two_seeds, allow_partial=True)
    card = evaluate_events(Pooled().eval(), data, tmp_path / "card", protocols=["linear"], options=options)
    assert list(card.skipped["ave"]) == [str(data / f"{name}.mp4")]
    assert (card.data["ave"].files, card.data["ave"].files_listed) == (11, 12)
    assert {row.count for row in card.results} == {1}


def write_features(folder: Path, *, shuffled: bool = False) -> Path:
    """40 rows, of which 24 are trained on, with places; the sound tells whether there is an event, the picture which.

    Row 39, of test, has the video of row 0.
    """
    rng = np.random.default_rng(0)
    lines, video, audio = [], 0.1 * rng.normal(size=(40, 10, 2, 4)), 0.1 * rng.normal(size=(40, 10, 3))
    for row in range(40):
        event, start = row % 3, row % 4
        lines.append(f"class {event}&film{0 if row == 39 else row}&good&{start}&{start + 5}")
        planted = rng.integers(3) if shuffled else event
        video[row, :, :, planted] += 1
        begin = rng.integers(5) if shuffled else start
        audio[row, begin : begin + 5, 0] += 1
    (folder / "Annotations.txt").write_text("\n".join(lines))
    for side, rows in (("train", range(24)), ("val", range(24, 30)), ("test", range(30, 40))):
        with h5py.File(folder / f"{side}_order.h5", "w") as file:
            file["order"] = np.asarray(rows)
    for name, values in (("visual", video), ("audio", audio)):
        with h5py.File(folder / f"{name}_feature.h5", "w") as file:
            file["avadataset"] = values
    return folder


def test_planted_features_are_learnt_and_shuffled_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = EVENT_RECIPES["linear"]
    quick = dataclasses.replace(recipe.training, learning_rate=0.05, batch_size=8)
    monkeypatch.setitem(EVENT_RECIPES, "linear", dataclasses.replace(recipe, training=quick))
    options = EventOptions(seeds=(0,), epochs=15)
    (tmp_path / "shuffled").mkdir()
    planted, _ = evaluate_events(
        "features", write_features(tmp_path), tmp_path / "a", protocols=["linear"], options=options
    ).results
    other, _ = evaluate_events(
        "features", write_features(tmp_path / "shuffled", shuffled=True), tmp_path / "b",
        protocols=["linear"], options=options,
    ).results  # fmt: skip
    assert planted.value > 0.95
    assert other.value < 0.65
    assert planted.metric == "accuracy"
    assert planted.chance == 0.5
    assert planted.settings == ("epochs=15", "ceiling=50.0 %", "annotations=not as published", "leaks=1")


def test_leaks_are_dropped_and_weak_training_has_videos_without_events(tmp_path: Path) -> None:
    write_features(tmp_path)
    for name, shape in (("visual", (2, 10, 2, 4)), ("audio", (2, 10, 3))):
        with h5py.File(tmp_path / f"{name}_feature_noisy.h5", "w") as file:
            file["avadataset"] = np.zeros(shape)
    options = EventOptions(seeds=(0,), epochs=1, drop_leaks=True)
    card = evaluate_events("features", tmp_path, tmp_path, protocols=["linear_weak", "cmbs_weak"], options=options)
    expected = (
        "epochs=1", "ceiling=50.0 %", "annotations=not as published", "dropped training rows=1",
        "training videos without events=2",
    )  # fmt: skip
    assert {row.settings for row in card.results} == {expected}
    facts = json.loads((tmp_path / "card.json").read_text())["data"]["ave"]
    assert (facts["files"], facts["files_listed"]) == (39, 39)  # what was dropped on purpose is not missing
    assert card.encoder.name == "features"


def test_published_features_are_named_as_in_the_table_of_published_numbers(tmp_path: Path) -> None:
    events = published_set(write_features(tmp_path))
    assert features_facts(events).kind == "features in files named as AVE's"
    assert features_facts(events).pretraining_data is None
    as_published = dataclasses.replace(
        events,
        data=dataclasses.replace(events.data, facts=dataclasses.replace(events.data.facts, published_order=True)),
        items=ItemsInMemory({"video": torch.zeros(1, 10, 49, 512), "audio": torch.zeros(1, 10, 128)}),
    )
    facts = features_facts(as_published)
    rows = [row for row in published_results() if row.ave is not None]
    assert len(rows) == 3
    assert {(row.backbone, row.pretraining) for row in rows} == {(facts.kind, facts.pretraining_data)}
    assert {row.kind for row in rows} <= EVENT_RECIPES.keys()
    assert AVE_TASK in PUBLISHED_TASKS
    assert set(AUROCS.values()) <= DECIMALS.keys()  # they are no shares


@pytest.mark.usefixtures("users_checks")
def test_what_encoders_protocols_and_options_must_be(world: Path, tmp_path: Path) -> None:
    deaf = Pooled().eval()
    deaf.modalities = ("video",)
    with pytest.raises(EncoderError, match="task ave: encoder Pooled must encode video and audio, got video alone"):
        evaluate_events(deaf, world, tmp_path)
    for asked, got in ((["knn"], "knn"), ([], "none")):
        with pytest.raises(TaskError, match=f"one of linear, cmbs, cace_net, linear_weak, cmbs_weak, got {got}"):
            evaluate_events(deaf, world, tmp_path, protocols=asked)  # type: ignore[arg-type]
    for changes, reason in (
        ({"seeds": ()}, r"--seeds must be different numbers of at least 0, got \(\)"),
        ({"seeds": (1, 1)}, r"--seeds must be different numbers"),
        ({"seeds": (-1,)}, r"--seeds must be different numbers"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
    ):
        with pytest.raises(TaskError, match=reason):
            EventOptions(**changes)  # type: ignore[arg-type]
