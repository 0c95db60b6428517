import copy
import dataclasses
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cmacc.clips import (
    AugmentConfig,
    ClipBatch,
    ClipSpec,
    LogMel,
    Manifest,
    View,
    decode_clip,
    draw_view,
    list_folders,
    scan,
    to_video,
)
from cmacc.clips.progress import silent
from cmacc.clips.synthetic import WorldConfig, mux
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.transfer import RECIPES, CmaccEncoder, LogMelStatistics
from cmacc.transfer.finetune import (
    Classifier,
    FinetuneConfig,
    Finetuned,
    FinetuneError,
    FinetuneFiles,
    FinetuneSettings,
    _augmented,
    _optimizer,
    _score,
    _to_frames,
    _views,
    finetune,
)

# Wider than high, and its 4/3 a whole number: the crops begin at columns 0, 8 and 16 of 64.
SPEC = ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=32, frame_width=48, audio_seconds=1.0)
BRIEF = FinetuneSettings(epochs=2, batch_size=8)


def tiny_encoder(spec: ClipSpec = SPEC) -> CmaccEncoder:
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=32, hidden_size=32, embedding_size=16))
    return CmaccEncoder(pair, spec, False).eval()


class Told:
    """A manifest with its classes and its parts, as `finetune` takes them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.class_of = np.asarray(manifest.label_indices(), np.int64)
        # Half of them: enough for every class, and it saves seconds.
        self.train_ids = manifest.ids_where(lambda record: record.split == "train")[::2]
        self.test_ids = manifest.ids_where(lambda record: record.split == "test")[::2]

    def finetune(self, encoder: Any, modality: Any = "video", **changes: Any) -> Finetuned:
        progress = changes.pop("progress", silent)
        ids = {"class_of": self.class_of, "train_ids": self.train_ids, "test_ids": self.test_ids}
        how: dict[str, Any] = {"settings": BRIEF, "windows": 2, "crops": 1}
        files = FinetuneFiles(self.manifest, **{name: changes.pop(name, value) for name, value in ids.items()})
        return finetune(encoder, modality, files, FinetuneConfig(**(how | changes)), progress)

    def one_step_an_epoch(self) -> dict[str, Any]:
        """Two training files of different classes, and the test files of these: arguments of `finetune`."""
        train_ids = [self.train_ids[0], self.train_ids[-1]]
        classes = set(self.class_of[train_ids].tolist())
        assert len(classes) == 2
        return {"train_ids": train_ids, "test_ids": [i for i in self.test_ids if self.class_of[i] in classes]}

    def with_lost_files(self, *lost: int) -> "Told":
        """The same, where the files of some rows are gone."""
        records = [
            dataclasses.replace(record, path=Path(f"{record.path}.lost")) if i in lost else record
            for i, record in enumerate(self.manifest.records)
        ]
        return Told(Manifest(records))


@pytest.fixture(scope="module")
def told(small_world: Path) -> Told:
    return Told(Manifest.read(small_world))


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast, so that numbers can be compared whatever the batches they were computed in."""
    # Not by its dotted name, which `cmacc.transfer` may give to the function.
    monkeypatch.setattr(sys.modules[finetune.__module__], "autocast_dtype", lambda *_: None)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(logits) / np.exp(logits).sum()


def accuracy(scores: NDArray[np.float32], sample_ids: NDArray[np.int64], class_of: NDArray[np.int64]) -> float:
    return float((scores.argmax(1) == class_of[sample_ids]).mean())


# ------------------------------------------------------------------------------------------------ testing


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_scores_are_the_mean_softmax_over_windows_and_crops(told: Told, modality: str) -> None:
    chosen = told.test_ids[:3]
    outcome = told.finetune(tiny_encoder(), modality, test_ids=chosen, windows=3, crops=3)
    wide = dataclasses.replace(SPEC, frame_width=64)
    expected = []
    for sample_id in chosen:
        record = told.manifest.records[sample_id]
        views = []
        for start in np.linspace(0.0, record.duration_seconds - SPEC.length_seconds, 3):
            clip = decode_clip(record.path, float(start), wide)
            for left in (0, 8, 16) if modality == "video" else (0,):
                view = clip.frames[None, :, :, left : left + 48] if modality == "video" else clip.waveform[None]
                with torch.no_grad():
                    views.append(softmax(outcome.classifier(view)[0].double().numpy()))
        assert len(views) == (9 if modality == "video" else 3)
        expected.append(np.mean(views, axis=0))
    assert outcome.sample_ids.tolist() == chosen
    np.testing.assert_allclose(outcome.scores, expected, atol=1e-5)
    # The views differ, or the average would say nothing.
    assert np.ptp([view.max() for view in views]) > 1e-3


def test_crops_are_left_centre_and_right() -> None:
    columns = torch.arange(16, dtype=torch.uint8)[None, None, None, :, None].expand(2, 4, 6, 16, 3)
    batch = ClipBatch(columns, torch.zeros(2, 5), torch.arange(2), torch.arange(2), {})
    spec = ClipSpec(frame_count=4, frame_height=6, frame_width=12)
    views = list(_views(batch, spec, "video", 3))
    assert [view[0, 0, 0, :, 0].tolist() for view in views] == [
        list(range(12)),
        list(range(2, 14)),
        list(range(4, 16)),
    ]
    assert all(view.shape == (2, 4, 6, 12, 3) and view.is_contiguous() for view in views)
    (whole,) = _views(batch, dataclasses.replace(spec, frame_width=16), "video", 1)
    assert torch.equal(whole, columns)
    (sound,) = _views(batch, spec, "audio", 1)
    assert sound is batch.waveforms


def test_the_one_window_of_a_short_file_is_encoded_once(told: Told) -> None:
    calls: list[tuple[str, int, int]] = []
    long = dataclasses.replace(SPEC, audio_seconds=3.0)  # the files are 2 s long
    many = told.finetune(tiny_encoder(long), "audio", windows=10, progress=lambda *call: calls.append(call))
    count = len(told.test_ids)
    assert [call for call in calls if call[0] == "test"] == [("test", count, count)]
    steps = len(told.train_ids) // 8 * 2
    assert [call for call in calls if call[0] == "fine-tune"] == [("fine-tune", i + 1, steps) for i in range(steps)]
    files = FinetuneFiles(told.manifest, told.class_of, told.train_ids, told.test_ids)
    one_window, _, _ = _score(many.classifier, files, FinetuneConfig(BRIEF, windows=1, crops=1), silent)
    np.testing.assert_array_equal(one_window, many.scores)


def test_files_that_do_not_decode_are_skipped_or_replaced_and_reported(told: Told) -> None:
    lost_train, lost_test = told.train_ids[1], told.test_ids[1]
    broken = told.with_lost_files(lost_train, lost_test)
    encoder = tiny_encoder()
    outcome = broken.finetune(encoder, "audio")
    assert outcome.sample_ids.tolist() == [i for i in told.test_ids if i != lost_test]
    assert outcome.scores.shape == (len(told.test_ids) - 1, 4)
    assert outcome.failures.keys() == {lost_train, lost_test}
    assert all(".lost" in reason for reason in outcome.failures.values())
    # The file that stands in for the lost one is trained with its own class: the lost one's has no effect.
    other_class = broken.class_of.copy()
    other_class[lost_train] = (other_class[lost_train] + 1) % 4
    same = broken.finetune(encoder, "audio", class_of=other_class)
    np.testing.assert_array_equal(same.scores, outcome.scores)


def test_no_test_file_that_decodes_gives_no_scores(told: Told) -> None:
    outcome = told.with_lost_files(*told.test_ids).finetune(tiny_encoder(), "audio")
    assert outcome.scores.shape == (0, 4)
    assert outcome.sample_ids.shape == (0,)
    assert sorted(outcome.failures) == told.test_ids


# ------------------------------------------------------------------------------------------------ training


def test_the_encoder_and_all_global_randomness_stay_as_they_were(told: Told) -> None:
    encoder = tiny_encoder()
    frozen = next(encoder.pair.video.parameters())
    frozen.requires_grad_(False)
    before = copy.deepcopy(encoder.state_dict())
    # Not Python's own generator: the tests' shape checks draw from it.
    states = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    outcome = told.finetune(encoder)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == str(np.random.get_state())  # noqa: NPY002
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not encoder.training
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in encoder.parameters())
    # Of the copy all of the picture's backbone was trained, frozen or not, batch norm's statistics included.
    tuned = outcome.classifier.encoder.state_dict()  # type: ignore[attr-defined]
    assert not any(torch.equal(before[name], tuned[name]) for name in before if name.startswith("pair.video.backbone"))
    assert not outcome.classifier.training
    np.testing.assert_allclose(outcome.scores.sum(1), 1.0, atol=1e-5)
    assert outcome.scores.dtype == np.float32
    assert outcome.scores.shape == (len(told.test_ids), 4)
    assert len(outcome.epoch_losses) == BRIEF.epochs


@pytest.mark.slow
def test_the_same_seed_gives_the_same_scores_with_any_number_of_workers(told: Told) -> None:
    encoder = tiny_encoder()
    first, second = told.finetune(encoder, workers=0), told.finetune(encoder, workers=1)
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.epoch_losses == second.epoch_losses
    assert not np.array_equal(first.scores, told.finetune(encoder, seed=1).scores)


def test_what_the_caller_draws_between_steps_does_not_matter(told: Told) -> None:
    encoder = tiny_encoder()
    quiet = told.finetune(encoder, "audio")
    noisy = told.finetune(encoder, "audio", progress=lambda *_: torch.rand(3))
    np.testing.assert_array_equal(quiet.scores, noisy.scores)


class Watched(nn.Module):
    """An encoder of the mean colour or loudness that keeps what it was given."""

    modalities = ("video", "audio")
    spec = SPEC
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 16)
        self.seen: list[tuple[bool, Tensor]] = []

    def embed_video(self, frames: Tensor) -> Tensor:
        self.seen.append((self.training, frames))
        return self.layer(frames.float().mean(dim=(1, 2, 3)) / 255)  # type: ignore[no-any-return]

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        self.seen.append((self.training, waveforms))
        return self.layer(waveforms.std(1, keepdim=True).expand(-1, 3))  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watched":
        twin = Watched()
        twin.load_state_dict(self.state_dict())
        twin.seen = self.seen
        return twin


@pytest.mark.parametrize(("modality", "shape"), [("video", (4, 32, 48, 3)), ("audio", (16_000,))])
def test_an_encoder_is_given_what_its_contract_says(told: Told, modality: str, shape: tuple[int, ...]) -> None:
    encoder = Watched()
    few = told.one_step_an_epoch()
    told.finetune(encoder, modality, crops=3, **few)
    trained = [inputs for training, inputs in encoder.seen if training]
    tested = [inputs for training, inputs in encoder.seen[1:] if not training]
    # Two files fill no batch of 8, so they make one of 2; an epoch is one step.
    assert [inputs.shape for inputs in trained] == [(2, *shape)] * BRIEF.epochs
    assert {inputs.shape[1:] for inputs in tested} == {shape}
    assert sum(len(inputs) for inputs in tested) == len(few["test_ids"]) * 2 * (3 if modality == "video" else 1)
    if modality == "video":
        assert {inputs.dtype for inputs in trained + tested} == {torch.uint8}
    else:
        assert all(inputs.abs().max() <= 1 for inputs in trained)
    # Every visit is another view of the file.
    assert not torch.equal(trained[0].sort(dim=0).values, trained[1].sort(dim=0).values)


def test_a_gain_keeps_sounds_within_one() -> None:
    config = AugmentConfig(gain_db=6.0)
    views = [draw_view(config, np.random.default_rng(i)) for i in range(8)]
    waveforms = torch.linspace(-1.0, 1.0, 100).expand(8, 100) * torch.linspace(0.1, 1.0, 8)[:, None]
    batch = ClipBatch(
        torch.zeros(8, 1, 2, 2, 3, dtype=torch.uint8), waveforms, torch.arange(8), torch.zeros(8).long(), {}
    )
    changed = _augmented(batch, "audio", views)
    factors = torch.tensor([10 ** (view.gain_db / 20) for view in views])
    wanted = factors * waveforms.amax(1)
    assert (wanted > 1).any()
    torch.testing.assert_close(changed.amax(1), wanted.clamp_max(1.0))
    # Scaled, not clipped.
    torch.testing.assert_close(changed / changed.amax(1, keepdim=True), waveforms / waveforms.amax(1, keepdim=True))


def test_without_augmentation_the_views_are_the_clips() -> None:
    still = AugmentConfig(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    frames = torch.randint(0, 256, (2, 3, 8, 10, 3), dtype=torch.uint8)
    batch = ClipBatch(frames, torch.zeros(2, 5), torch.arange(2), torch.arange(2), {})
    views: list[View] = [draw_view(still, np.random.default_rng(i)) for i in range(2)]
    assert torch.equal(_augmented(batch, "video", views), frames)


def test_pixels_come_back_exactly() -> None:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(2, 3, 16, 16, 3)
    assert torch.equal(_to_frames(to_video(every_value)), every_value)
    # Nearest, not below; and never around the end.
    step = to_video(every_value)[0, 0, 0, 0, 1] - to_video(every_value)[0, 0, 0, 0, 0]
    assert torch.equal(_to_frames(to_video(every_value) + 0.4 * step), every_value)
    assert torch.equal(_to_frames(to_video(every_value) - 0.4 * step), every_value)
    assert _to_frames(to_video(every_value) + 300 * step).unique().tolist() == [255]
    assert _to_frames(to_video(every_value) - 300 * step).unique().tolist() == [0]


def test_rates_and_decay_by_part() -> None:
    settings = FinetuneSettings()
    classifier = Classifier(tiny_encoder(), "video", 1536, 4, 0.5)
    groups = _optimizer(classifier, settings).param_groups
    given = {id(p): (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        id(p): (1e-3 if name.startswith("linear") else 3e-4, 0.05 if p.ndim > 1 else 0.0)
        for name, p in classifier.named_parameters()
    }
    assert given == expected
    assert len(groups) == 4


def test_the_rate_rises_for_a_tenth_of_the_steps_then_falls_to_zero(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []

    class Recording(torch.optim.AdamW):
        def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr("torch.optim.AdamW", Recording)
    settings = FinetuneSettings(epochs=20, batch_size=2, head_learning_rate=0.5, learning_rate=0.25)
    told.finetune(Watched(), "audio", settings=settings, **told.one_step_an_epoch())
    encoder_rates, head_rates = (np.asarray([max(row) for row in rates]), np.asarray([min(row) for row in rates]))
    done = np.arange(18) / 18
    expected = np.concatenate([[0.5, 1.0], 0.5 * (1 + np.cos(np.pi * done))])
    np.testing.assert_allclose(encoder_rates, 0.5 * expected)
    np.testing.assert_allclose(head_rates, 0.25 * expected)


def test_dropout_and_smoothing_are_in_the_loss(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Tensor, float]] = []
    original = functional.cross_entropy

    def recording(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        calls.append((logits.detach(), targets, label_smoothing))
        return original(logits, targets, label_smoothing=label_smoothing)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", recording)
    encoder = Watched()
    few = told.one_step_an_epoch()
    dropped = told.finetune(encoder, "audio", **few)
    whole = told.finetune(encoder, "audio", **few, settings=dataclasses.replace(BRIEF, dropout=0.0))
    assert not torch.equal(calls[0][0], calls[BRIEF.epochs][0])
    assert {smoothing for _, _, smoothing in calls} == {0.1}
    assert dropped.classifier.dropout.p == 0.5
    assert whole.classifier.dropout.p == 0.0
    for _, targets, _ in calls:
        assert sorted(targets.tolist()) == sorted(told.class_of[few["train_ids"]].tolist())


# ------------------------------------------------------------------------------------------------ learning


class MeanColour(nn.Module):
    """A small network on the mean colour, or on the mean spectrum."""

    modalities = ("video", "audio")
    device = torch.device("cpu")
    spec = ClipSpec(frame_count=2, frame_rate_hz=4.0, frame_height=16, frame_width=16, audio_seconds=0.5)

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel(self.spec.sample_rate_hz, 32)
        self.colour = nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.sound = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())

    def embed_video(self, frames: Tensor) -> Tensor:
        return self.colour(frames.float().mean(dim=(1, 2, 3)) / 255)  # type: ignore[no-any-return]

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return self.sound(self.log_mel(waveforms).mean(2))  # type: ignore[no-any-return]


COUNT_OF_A_CLASS = 16


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Pictures of one second in noisy red, green, blue or yellow: 40 to train, 24 to test."""
    folder = tmp_path_factory.mktemp("colours")
    world = WorldConfig(clip_count=1, frame_size=32, duration_seconds=1.0, frame_rate_hz=8)
    rng = np.random.default_rng(0)
    for name, colour in (("r", (180, 60, 60)), ("g", (60, 180, 60)), ("b", (60, 60, 180)), ("y", (180, 180, 60))):
        (folder / name).mkdir()
        for i in range(COUNT_OF_A_CLASS):
            frames = np.asarray(colour) + rng.normal(0, 20, 3) + rng.normal(0, 20, (8, 32, 32, 3))
            sound = rng.normal(0, 0.1, (world.sample_rate_hz, 2)).astype(np.float32)
            mux(frames.clip(0, 255).astype(np.uint8), sound, folder / name / f"{name}{i:02d}.mp4", world)
    return planted(folder)


@pytest.fixture(scope="module")
def pitches(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Sounds of one second around four pitches in noise: 40 to train, 24 to test."""
    folder = tmp_path_factory.mktemp("pitches")
    rng = np.random.default_rng(0)
    seconds = np.arange(16_000) / 16_000
    for pitch in (300, 700, 1500, 3000):
        (folder / str(pitch)).mkdir()
        for i in range(COUNT_OF_A_CLASS):
            tone = 0.2 * np.sin(2 * np.pi * pitch * rng.uniform(0.9, 1.1) * seconds) + rng.normal(0, 0.05, 16_000)
            with wave.open(str(folder / str(pitch) / f"{i:02d}.wav"), "wb") as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes((tone.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return planted(folder)


def planted(folder: Path) -> Told:
    told = Told(scan(list_folders([folder])).manifest)
    order = np.random.default_rng(1).permutation(len(told.class_of))
    told.train_ids, told.test_ids = sorted(order[:40].tolist()), sorted(order[40:].tolist())
    return told


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_it_learns_what_there_is_and_nothing_from_shuffled_classes(
    modality: str, request: pytest.FixtureRequest
) -> None:
    data: Told = request.getfixturevalue("colours" if modality == "video" else "pitches")
    settings = FinetuneSettings(epochs=6, batch_size=4, head_learning_rate=1e-2, learning_rate=1e-2)
    encoder = MeanColour()
    outcome = data.finetune(encoder, modality, settings=settings)
    # Of 24 test files guessing names 6; 16 or more have p = 2e-5 (binomial), and of 40 training files 24, p = 3e-6.
    assert accuracy(outcome.scores, outcome.sample_ids, data.class_of) >= 16 / 24
    files = FinetuneFiles(data.manifest, data.class_of, data.train_ids, data.train_ids)
    scores, ids, _ = _score(outcome.classifier, files, FinetuneConfig(BRIEF, windows=2, crops=1), silent)
    assert accuracy(scores, ids, data.class_of) >= 24 / 40
    assert outcome.epoch_losses[-1] < outcome.epoch_losses[0] - 0.3

    shuffled = np.random.default_rng(2).permutation(data.class_of)
    lost = data.finetune(encoder, modality, settings=settings, class_of=shuffled)
    assert accuracy(lost.scores, lost.sample_ids, shuffled) < 13 / 24  # at chance, 13 or more have p = 0.002


# ------------------------------------------------------------------------------------------------ bad input


class NoModule:
    modalities = ("video",)
    spec = SPEC
    device = torch.device("cpu")

    def embed_video(self, frames: Tensor) -> Tensor:
        return torch.zeros(len(frames), 3)

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return torch.zeros(len(waveforms), 3)


class Detached(Watched):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Detached":
        return Detached()

    def embed_video(self, frames: Tensor) -> Tensor:
        return super().embed_video(frames).detach()


class Unpooled(Detached):
    def embed_video(self, frames: Tensor) -> Tensor:
        return self.layer(frames.float().mean(dim=(1, 2)))  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpooled":
        return Unpooled()


class Exploding(Watched):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Exploding":
        return Exploding()

    def embed_video(self, frames: Tensor) -> Tensor:
        return super().embed_video(frames) * float("inf")


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("encoder", "modality", "message"),
    [
        (LogMelStatistics(), "audio", "encoder must have parameters to train, got LogMelStatistics without any"),
        (LogMelStatistics(), "video", r"modality must be one that the encoder has \(audio\), got video"),
        (NoModule(), "video", "encoder must be an nn.Module, got NoModule"),
        (Detached(), "video", "embed_video must be differentiable in the encoder's parameters"),
        (Unpooled(), "video", r"features must be of shape \(batch, features\), got \(1, 48, 16\)"),
        (Exploding(), "video", "the loss at step 0 must be finite, got"),
    ],
)
def test_an_encoder_that_cannot_be_trained(told: Told, encoder: Any, modality: str, message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        told.finetune(encoder, modality)


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_ids": [3]}, "train_ids must be at least 2 files, got 1"),
        ({"test_ids": []}, "test_ids must be at least 1 files, got 0"),
        ({"train_ids": [3, 3, 4]}, "train_ids must be different files, got 1 repeated"),
        ({"train_ids": [0, 48]}, r"train_ids must be rows of the manifest, in \[0, 48\), got \[48\]"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"crops": 0}, "crops must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"class_of": np.zeros(3, np.int64)}, r"class_of must be of shape \(48,\), got \(3,\)"),
        ({"class_of": np.full(48, -1)}, "train_ids must be files with a class, got 18 without"),
        ({"class_of": np.zeros(48, np.int64)}, "train_ids must be of at least 2 classes, got 1"),
    ],
)
def test_files_and_numbers_that_cannot_be(told: Told, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        told.finetune(tiny_encoder(), **changes)


def test_a_test_class_needs_training_files_and_no_file_is_in_both_parts(told: Told) -> None:
    unseen = told.class_of.copy()
    unseen[told.test_ids[0]] = 4
    with pytest.raises(FinetuneError, match="test_ids must be of classes that train_ids have, got class 4"):
        told.finetune(tiny_encoder(), class_of=unseen)
    with pytest.raises(FinetuneError, match="test_ids must be other files than train_ids, got 1 that are in both"):
        told.finetune(tiny_encoder(), test_ids=[*told.test_ids, told.train_ids[0]])


def test_files_without_the_medium(told: Told) -> None:
    records = [dataclasses.replace(record, has_audio=False, width=0) for record in told.manifest.records]
    blank = Told(Manifest(records))
    with pytest.raises(FinetuneError, match="train_ids must be files with a picture, got 18 without"):
        blank.finetune(tiny_encoder())
    with pytest.raises(FinetuneError, match="train_ids must be files with sound, got 18 without"):
        blank.finetune(tiny_encoder(), "audio")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1 and finite, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2 and finite, got 1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"head_learning_rate": float("nan")}, "head_learning_rate must be positive and finite, got nan"),
        ({"warmup_share": 1.0}, r"warmup_share must be in \[0, 1\), got 1.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"augment": AugmentConfig(frequency_mask=0.0)}, "augment.time_mask must be 0 .*, got 0.15"),
        ({"augment": AugmentConfig(time_mask=0.0)}, "augment.frequency_mask must be 0 .*, got 0.15"),
        (
            {"augment": AugmentConfig(time_mask=0.0, frequency_mask=0.0, stretch=2.0)},
            "augment.stretch must be 1 .*, got 2.0",
        ),
        (
            {"augment": AugmentConfig(time_mask=0.0, frequency_mask=0.0, window=0.5)},
            "augment.window must be 1 .*, got 0.5",
        ),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError, match=f"FinetuneSettings: {message}"):
        FinetuneSettings(**changes)


def test_the_recipes_text_says_what_is_done() -> None:
    settings, text = FinetuneSettings(), RECIPES["finetune"].summary
    assert f"{settings.epochs} epochs" in text
    assert f"{settings.learning_rate:.0e}".replace("e-0", "e-") in text
    assert f"{settings.head_learning_rate:.0e}".replace("e-0", "e-") in text
