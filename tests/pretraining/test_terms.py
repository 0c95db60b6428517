"""The terms of the objective in the engine: each learns what there is to learn, resumes, and is refused where it must.

Their losses are tested in `tests/objectives`; here they train, from a config, on a planted world.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmacc.ablation import PlanError, plan_from_plain
from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.clips import AugmentConfig, ClipBatch, ClipSpec, to_video
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.objectives import (
    BatchViews,
    CrossCLRConfig,
    Drawn,
    ExtraInput,
    FaceConfig,
    MaskedAudioConfig,
    ObjectiveInputs,
    ObjectiveResult,
    Terms,
    WithinModalConfig,
)
from cmacc.pretraining import (
    ConfigError,
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    Trainer,
    config_from_plain,
    untrained_encoder,
)
from cmacc.pretraining.batch_views import draw_for
from cmacc.pretraining.checkpoint import load_checkpoint, save_checkpoint
from cmacc.pretraining.clip_views import ClipViews, audio_input
from cmacc.pretraining.table import TableProblem
from cmacc.transfer import ranks

CPU = torch.device("cpu")
CLIP = ClipSpec(
    frame_count=6, frame_rate_hz=6.0, frame_height=32, frame_width=32, audio_seconds=1.0, sample_rate_hz=8000
)
ALL = dict.fromkeys(Terms.names(), 1.0)


class Planted:
    """Clips of a lamp that is lit while a tone sounds: its column tells the pitch."""

    in_float32 = True

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        frames = rng.integers(0, 60, (count, CLIP.frame_count, 32, 32, 3))
        waveforms = 1e-4 * rng.normal(size=(count, CLIP.sample_count))
        seconds = np.arange(CLIP.sample_count) / CLIP.sample_rate_hz
        for clip in range(count):
            column, onset, lit = rng.integers(0, 7), rng.integers(0, 5), rng.integers(2, 5)
            frames[clip, onset : onset + lit, 18:30, 3 * column : 3 * column + 12] = 255
            heard = (seconds >= onset / 6) & (seconds < (onset + lit) / 6)
            waveforms[clip] += 0.3 * heard * np.sign(np.sin(2 * np.pi * 150 * 1.45**column * seconds))
        self.frames = torch.from_numpy(frames.clip(0, 255).astype(np.uint8))
        self.waveforms = torch.from_numpy(waveforms.astype(np.float32))
        self.labels = torch.full((count,), -1)

    def encoder(self, config: PretrainConfig) -> AudioVisualEncoder:
        return untrained_encoder(config)

    def views(self, config: PretrainConfig) -> ClipViews:
        return ClipViews(config, CPU)

    def batch(self, sample_ids: Tensor) -> ClipBatch:
        return ClipBatch(self.frames[sample_ids], self.waveforms[sample_ids], sample_ids, self.labels[sample_ids], {})


def config_of(terms: dict[str, float], steps: int = 60, **settings: Any) -> PretrainConfig:
    objective = ObjectiveConfig(
        terms=Terms(**{"cross_modal": 0.0, **terms}),
        crossclr=CrossCLRConfig(queue_size=48),
        face=FaceConfig(size=16, frames_per_clip=4, width=8),
        masked_audio=MaskedAudioConfig(block_bands=8, block_frames=8),
    )
    plain = PretrainConfig(
        data=DataConfig(clip=CLIP, augment=AugmentConfig(min_crop_area=0.9, flip_probability=0.0, gain_db=3.0)),
        encoder=EncoderConfig(mel_bins=32, hidden_size=64, embedding_size=32),
        objective=objective,
        optim=OptimConfig(batch_size=16, steps=steps, warmup_steps=min(5, steps // 4), learning_rate=2e-3),
        precision="fp32",
    )
    return dataclasses.replace(plain, **settings)


def trainer_on(data: Any, config: PretrainConfig) -> Trainer:
    return Trainer(TableProblem(data, config, CPU), config, CPU)


@torch.no_grad()
def found_first(trainer: Trainer) -> int:
    """Of 100 held-out clips in both directions, how many find their own pair first; by chance, 2.

    Not the mean rank: a map of the columns that is learnt by accident, right or wrong, moves it far from chance.
    """
    held_out, encoder = Planted(100, 7), trainer.learner.encoder.eval()
    sounds = audio_input(trainer.config.encoder, CLIP.sample_rate_hz)(held_out.waveforms)
    found = encoder(video=to_video(held_out.frames), audio=sounds)
    video, audio = (found[modality].embedding.numpy() for modality in ("video", "audio"))
    return int((ranks(video, audio) == 1).sum() + (ranks(audio, video) == 1).sum())


def trained(
    term: str, shuffled: bool, steps: int, learning_rate: float = 2e-3, **encoder: Any
) -> tuple[Trainer, dict[str, float]]:
    """A trainer at the end of a run of one term, and its metrics by then."""
    config = config_of({term: 1.0}, steps)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, shuffle_pairs=shuffled),
        optim=dataclasses.replace(config.optim, learning_rate=learning_rate),
        encoder=dataclasses.replace(config.encoder, **encoder),
    )
    trainer = trainer_on(Planted(192, 0), config)
    found = [done.metrics for done in trainer.steps()][-12:]
    return trainer, {name: float(np.mean([row[name] for row in found])) for name in found[-1]}


# The terms that contrast learn a planted world and, by the same measure, nothing with shuffled pairs. The others do so
# in tests/objectives. For speed without shape checks, which other tests have.


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("term", ["crossclr", "stica"])
def test_terms_on_pairs_learn_which_belong_together(term: str, shuffled: bool) -> None:
    trainer, _ = trained(term, shuffled, 70)
    count = found_first(trainer)
    assert count < 12 if shuffled else count > 24  # chance is Binomial(200, 1 / 100): p < 1e-5 above 11


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize("shuffled", [False, True])
def test_within_modal_learns_which_views_belong_together(shuffled: bool) -> None:
    _, found = trained("within_modal", shuffled, 20)
    for modality in ("video", "audio"):
        top1 = found[f"within_modal/{modality}/top1"]
        # Chance is 1 / 16. Shuffled, the mean of 12 batches of 32 queries, which are not independent, so a wide limit.
        assert top1 < 2.5 / 16 if shuffled else top1 > 0.5


class TwoOfEach:
    """An objective that draws a second view and a target of each modality."""

    needs_keys = needs_feature_maps = False

    def draw(self, batch: BatchViews) -> Drawn:
        names = ("video", "audio")
        return Drawn(
            {name: ExtraInput(name, batch.another(name)) for name in names}, {name: batch.plain(name) for name in names}
        )

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        raise NotImplementedError


def test_with_shuffled_pairs_nothing_beside_a_picture_or_a_sound_is_of_its_clip() -> None:
    unchanged = AugmentConfig(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    config = config_of({"cross_modal": 1.0}, steps=1)
    data = dataclasses.replace(config.data, augment=unchanged, shuffle_pairs=True)
    planted = Planted(16, 0)
    learner, batch = (
        trainer_on(planted, dataclasses.replace(config, data=data)).learner,
        planted.batch(torch.arange(16)),
    )
    learner.objective = TwoOfEach()
    plain = {
        "video": to_video(planted.frames),
        "audio": audio_input(config.encoder, CLIP.sample_rate_hz)(planted.waveforms),
    }

    def clips_of(rows: Mapping[Any, Tensor]) -> list[Tensor]:
        return [torch.cdist(rows[name].flatten(1), plain[name].flatten(1)).argmin(1) for name in plain]

    inputs = learner.views.of(batch, 0)
    picture, sound = clips_of(inputs)
    drawn = draw_for(learner, batch, 0, inputs)
    others = clips_of({name: extra.tensor for name, extra in drawn.inputs.items()}) + clips_of(drawn.given)
    assert torch.equal(picture, torch.arange(16))
    for other in others:
        assert not torch.any((other == picture) | (other == sound))
    assert not torch.any(picture == sound)


@pytest.mark.parametrize("terms", [*({name: 1.0} for name in ALL), ALL], ids=[*ALL, "all"])
def test_a_run_resumes_bit_by_bit(terms: dict[str, float], tmp_path: Path) -> None:
    data, config = Planted(48, 0), config_of(terms, steps=5)
    whole = trainer_on(data, config)
    wanted = [done.metrics for done in whole.steps(3)]
    folder = save_checkpoint(whole.learner, tmp_path, 3, 0)
    wanted += [done.metrics for done in whole.steps()]
    again = trainer_on(data, config)
    load_checkpoint(again.learner, folder)
    again.next_step = 3
    found = [done.metrics for done in again.steps()]
    timed = ("seconds", "clips_per_second")
    for one, other in zip(wanted[3:], found, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
            k: v for k, v in other.items() if not k.startswith(timed)
        }
    for one_tensor, other_tensor in zip(
        whole.learner.encoder.state_dict().values(), again.learner.encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(one_tensor, other_tensor)


def test_all_terms_run_on_frame_differences_pooled_by_their_mean() -> None:
    """A frame fewer, and a map that is pooled by another module: patches, crops and frames to predict still fit."""
    config = config_of(ALL, optim=OptimConfig(batch_size=8, steps=2, warmup_steps=0))
    encoder = dataclasses.replace(config.encoder, video_input="differences", video_pooling="mean")
    rows = [done.metrics for done in trainer_on(Planted(48, 0), dataclasses.replace(config, encoder=encoder)).steps()]
    assert {f"{name}/loss" for name in ALL} <= rows[-1].keys()
    assert np.isfinite(list(rows[-1].values())).all()


def test_a_weighted_sum_is_logged_term_by_term() -> None:
    trainer = trainer_on(Planted(48, 0), config_of({"cross_modal": 1.0, "within_modal": 0.5, "ctp": 0.1}, steps=1))
    (done,) = trainer.steps()
    row = done.metrics
    parts = row["cross_modal/loss"] + 0.5 * row["within_modal/loss"] + 0.1 * row["ctp/loss"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_cross_modal_alone_is_what_it_was_with_and_without_a_name() -> None:
    """A weight of 1 and no other term: the metrics have no prefix, and the loss is that of `BidirectionalContrast`."""
    data = Planted(48, 0)
    plain = [done.metrics for done in trainer_on(data, config_of({"cross_modal": 1.0}, steps=2)).steps()]
    # With another weight it is one of a sum; the first loss is before any step.
    half = [done.metrics for done in trainer_on(data, config_of({"cross_modal": 0.5}, steps=2)).steps()]
    assert "video_to_audio/loss" in plain[0]
    assert half[0]["cross_modal/loss"] == plain[0]["loss"]
    assert half[0]["loss"] == pytest.approx(plain[0]["loss"] / 2, rel=1e-6)


def test_a_term_does_not_change_the_encoders_first_weights_nor_the_views() -> None:
    data = Planted(48, 0)
    alone, more = (
        trainer_on(data, config_of(terms, steps=1))
        for terms in ({"cross_modal": 1.0}, {"cross_modal": 1.0, "ctp": 1.0})
    )
    for one, other in zip(
        alone.learner.encoder.state_dict().values(), more.learner.encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    (first,), (second,) = list(alone.steps()), list(more.steps())
    assert second.metrics["cross_modal/loss"] == first.metrics["loss"]


def test_only_queries_move_the_running_statistics_of_heads() -> None:
    trainer = trainer_on(Planted(48, 0), config_of({"stica": 1.0}, steps=1))
    norms = [m for m in trainer.learner.encoder.video.hidden.modules() if hasattr(m, "running_mean")]
    list(trainer.steps())
    # Of the queries alone, neither of the other view nor of crops.
    plain = trainer_on(Planted(48, 0), config_of({"cross_modal": 1.0}, steps=1))
    list(plain.steps())
    wanted = [m for m in plain.learner.encoder.video.hidden.modules() if hasattr(m, "running_mean")]
    for one, other in zip(norms, wanted, strict=True):
        assert torch.allclose(one.running_mean, other.running_mean)  # type: ignore[arg-type]
        assert torch.allclose(one.running_var, other.running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("term", ["ctp", "stica", "face", "masked_audio"])
def test_what_needs_maps_is_refused_on_vectors(term: str) -> None:
    dataset = VectorDataset(VectorWorld(samples=32, held_out=16), 0, CPU)
    with pytest.raises(ConfigError, match=rf"objective\.terms\.{term} must be 0 without a feature map of the"):
        trainer_on(dataset, config_of({term: 1.0}, steps=1))
    plain = {"problem": {"kind": "vectors"}, "variants": {"one": {f"objective.terms.{term}": 1.0}}}
    with pytest.raises(
        PlanError, match=rf"variant 'one': objective\.terms\.{term} must be 0 for problem\.kind=vectors"
    ):
        plan_from_plain(plain)


@pytest.mark.parametrize("term", ["within_modal", "crossclr"])
def test_other_terms_train_on_vectors(term: str) -> None:
    dataset = VectorDataset(VectorWorld(samples=64, held_out=16), 0, CPU)
    (first, second) = trainer_on(dataset, config_of({term: 1.0}, steps=2)).steps()
    assert np.isfinite(second.metrics["loss"])
    assert first.metrics["loss"] != second.metrics["loss"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"objective": {"terms": {"cross_modal": 0}}}, "objective.terms must have a weight above 0, got none"),
        ({"objective": {"terms": {"ctp": -1}}}, "objective.terms.ctp must be at least 0 and finite, got -1"),
        ({"objective": {"terms": {"other": 1}}}, "unknown setting objective.terms.other"),
        (
            {"objective": {"terms": {"cross_modal": 0, "crossclr": 1}}, "dictionary": {"selector": "newest"}},
            "dictionary.selector must be none where objective.terms.cross_modal is 0, got newest",
        ),
        (
            {"objective": {"terms": {"within_modal": 1}}, "optim": {"chunk_size": 4}},
            "optim.chunk_size must be null with objective.terms that encode more than the batch",
        ),
        (
            {"objective": {"terms": {"cross_modal": 0, "ctp": 1, "masked_audio": 1}}, "eval_every": 5},
            r"eval_every must be 0 where no term brings video and audio into one space \(ctp, masked_audio\), got 5",
        ),
        (
            {"data": {"augment": {"window": 0.5}}},
            "data.augment.window must be 1 where a clip's picture and",
        ),
        (
            {"data": {"shuffle_pairs": True}, "optim": {"batch_size": 2}},
            "optim.batch_size must be at least 4",
        ),
        (
            {"objective": {"terms": {"face": 1}}, "data": {"clip": {"audio_seconds": 0.5}}},
            "data.clip.audio_seconds must be at least the 1 s of picture with objective.terms.face, got 0.5",
        ),
        (
            {"objective": {"terms": {"ctp": 1}}, "train": {"video": "head", "audio": "head"}},
            "objective.terms.ctp must be 0 with train.video and train.audio both head",
        ),
        (
            {"objective": {"terms": {"face": 1}}, "data": {"augment": {"window": 0.5}}},
            "data.augment.window must be 1 with objective.terms.face, .*, got 0.5",
        ),
        (
            {"objective": {"terms": {"crossclr": 1}, "crossclr": {"queue_size": 8}}},
            r"objective.crossclr.queue_size must be at least optim.batch_size \(32\), got 8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        config_from_plain(settings)


def test_the_modalities_are_those_that_the_terms_need() -> None:
    assert ObjectiveConfig().modalities == ("video", "audio")
    assert config_of({"ctp": 1.0}).objective.modalities == ("video",)
    assert config_of({"masked_audio": 1.0}).objective.modalities == ("audio",)
    audio = ObjectiveConfig(
        terms=Terms(cross_modal=0.0, within_modal=1.0), within_modal=WithinModalConfig(modalities=("audio",))
    )
    assert audio.modalities == ("audio",)


def test_all_other_terms_take_windows_of_clips() -> None:
    terms = {name: weight for name, weight in ALL.items() if name != "face"}
    config = config_of(terms, steps=6, encoder=EncoderConfig(audio="small", mel_bins=32))
    augment = dataclasses.replace(config.data.augment, window=0.5, stretch=1.5)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, augment=augment))
    rows = [done.metrics for done in trainer_on(Planted(48, 0), config).steps()]
    for name in terms:
        assert np.isfinite([row[f"{name}/loss"] for row in rows if f"{name}/loss" in row]).all()
        assert any(key.startswith(f"{name}/") for key in rows[-1])


def test_a_dictionary_goes_with_cross_modal_among_others() -> None:
    config = config_of(
        {"cross_modal": 1.0, "masked_audio": 0.5}, steps=3, dictionary=DictionaryConfig("active", 16, 32)
    )
    rows = [done.metrics for done in trainer_on(Planted(64, 0), config).steps()]
    assert "masked_audio/loss" in rows[-1]
    assert rows[-1]["refreshed_keys"] > 0
