"""Masked spectrograms: what is hidden, the loss against plain loops, and that structure is learnt and noise is not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor
from torch.autograd import gradcheck

from cmacc.encoders.audio import build_audio_backbone
from cmacc.encoders.backbone import Backbone
from cmacc.objectives.masked_audio import MaskedAudio, MaskedAudioConfig, draw_mask
from cmacc.objectives.objective import DrawingObjective, Drawn, ObjectiveInputs

from .stand_ins import Embedded, Views


def sounds(audio: Tensor, sample_ids: tuple[int, ...] | None = None, visit: int = 0) -> Views:
    return Views({"audio": audio}, sample_ids, visit)


def told(drawn: Drawn, feature_map: Tensor | None) -> ObjectiveInputs:
    ids = torch.arange(len(drawn.given["mask"]))
    return ObjectiveInputs({}, {}, {}, ids, more={"audio": Embedded(feature_map=feature_map)}, given=drawn.given)


def with_random_last_layer(objective: MaskedAudio) -> MaskedAudio:
    torch.nn.init.normal_(objective.last.weight)
    assert objective.last.bias is not None
    torch.nn.init.normal_(objective.last.bias)
    return objective


def naive_decode(objective: MaskedAudio, feature_map: np.ndarray, bands: int, frames: int) -> np.ndarray:
    """Place by place, for a map of the grid's size: each place writes its own patch of 8 x 8."""
    weights = {name: value.detach().numpy() for name, value in objective.named_parameters()}
    samples, _, rows, columns = feature_map.shape
    decoded = np.full((samples, bands, frames), np.nan)
    for sample in range(samples):
        hidden = np.zeros((objective.config.width, rows + 2, columns + 2))  # with a border of zeros
        for row in range(rows):
            for column in range(columns):
                reduced = weights["reduce.weight"][:, :, 0, 0] @ feature_map[sample, :, row, column]
                reduced = reduced + weights["reduce.bias"] + weights["row_code"][:, row, 0]
                hidden[:, row + 1, column + 1] = np.maximum(reduced, 0)
        for row in range(rows):
            for column in range(columns):
                around = hidden[:, row : row + 3, column : column + 3]
                mixed = np.array([(kernel * around).sum() for kernel in weights["mix.weight"]]) + weights["mix.bias"]
                patch = weights["last.weight"][:, :, 0, 0] @ np.maximum(mixed, 0) + weights["last.bias"]
                for number, value in enumerate(patch):
                    band, frame = 8 * row + number // 8, 8 * column + number % 8
                    if band < bands and frame < frames:
                        decoded[sample, band, frame] = value
    return decoded


@pytest.mark.parametrize("visible_weight", [0.0, 0.7])
def test_the_loss_is_that_of_plain_loops_in_float64(visible_weight: float) -> None:
    config = MaskedAudioConfig(block_bands=4, block_frames=5, visible_weight=visible_weight, width=3)
    objective = with_random_last_layer(MaskedAudio(config, 2, 12)).double()
    clean = 3 * torch.randn(3, 12, 21, dtype=torch.float64) - 7
    drawn = objective.draw(sounds(clean))
    feature_map = torch.randn(3, 2, 2, 3, dtype=torch.float64)
    result = objective(told(drawn, feature_map))

    decoded = naive_decode(objective, feature_map.numpy(), 12, 21)
    hidden, shown, base = [], [], []
    for sample in range(3):
        mask = drawn.given["mask"][sample].numpy()
        x = clean[sample].numpy()
        visible = [x[b, f] for b in range(12) for f in range(21) if not mask[b, f]]
        mean = sum(visible) / len(visible)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in visible) / len(visible))
        for b in range(12):
            for f in range(21):
                target = (x[b, f] - mean) / deviation
                (hidden if mask[b, f] else shown).append(abs(decoded[sample, b, f] - target))
                if mask[b, f]:
                    base.append(abs(target))
    l1, baseline = sum(hidden) / len(hidden), sum(base) / len(base)
    assert result.loss.item() == pytest.approx(l1 + visible_weight * sum(shown) / len(shown), rel=1e-12)
    assert {name: value.item() for name, value in result.metrics.items()} == pytest.approx(
        {"loss": result.loss.item(), "l1": l1, "baseline": baseline, "explained": 1 - l1 / baseline}, rel=1e-12
    )
    assert not any(value.requires_grad for value in result.metrics.values())


@pytest.mark.parametrize("places", [(2, 3), (1, 2), (2,)])
def test_the_gradient_is_that_of_differences(places: tuple[int, ...]) -> None:
    objective = with_random_last_layer(
        MaskedAudio(MaskedAudioConfig(block_bands=4, block_frames=4, visible_weight=0.5, width=2), 2, 10)
    ).double()
    drawn = objective.draw(sounds(torch.randn(2, 10, 12, dtype=torch.float64)))
    feature_map = torch.randn(2, 2, *places, dtype=torch.float64, requires_grad=True)
    names, values = zip(*objective.named_parameters(), strict=True)

    def loss(feature_map: Tensor, *weights: Tensor) -> Tensor:
        replaced = dict(zip(names, weights, strict=True))
        outcome = torch.func.functional_call(objective, replaced, (told(drawn, feature_map),))
        assert isinstance(outcome.loss, Tensor)
        return outcome.loss

    assert gradcheck(loss, (feature_map, *values), fast_mode=True)  # along random directions
    assert gradcheck(loss, (feature_map, *(value.detach() for value in values)))


def test_every_block_is_hidden_as_often_as_the_share_says() -> None:
    """Each count is binomial. Bounds for all 65 together at a significance of 1e-3 (Bonferroni)."""
    config, samples = MaskedAudioConfig(masked_share=0.4), 400
    masks = torch.stack([draw_mask(np.random.default_rng([5, i]), 80, 201, config) for i in range(samples)]).numpy()
    corners = masks[:, ::16, ::16]
    blocks = corners[0].size
    assert blocks == 65
    assert (corners.sum(axis=(1, 2)) == round(0.4 * blocks)).all()
    low, high = binom.interval(1 - 1e-3 / blocks, samples, 0.4)
    counts = corners.sum(axis=0)
    assert low <= counts.min()
    assert counts.max() <= high
    # Whole blocks: every place has the value of its block's first place.
    assert (masks == corners.repeat(16, axis=1).repeat(16, axis=2)[:, :80, :201]).all()
    assert len({mask.tobytes() for mask in masks}) == samples


@settings(max_examples=50)
@given(
    bands=st.integers(1, 40),
    frames=st.integers(2, 60),
    block_bands=st.integers(1, 50),
    block_frames=st.integers(1, 50),
    share=st.floats(0.01, 0.99),
)
def test_something_is_hidden_and_something_is_not(
    bands: int, frames: int, block_bands: int, block_frames: int, share: float
) -> None:
    config = MaskedAudioConfig(masked_share=share, block_bands=block_bands, block_frames=block_frames)
    if block_bands >= bands and block_frames >= frames:
        with pytest.raises(ValueError, match=f"smaller than the spectrogram of {bands} bands and {frames} frames"):
            draw_mask(np.random.default_rng(0), bands, frames, config)
        return
    mask = draw_mask(np.random.default_rng(0), bands, frames, config)
    assert mask.shape == (bands, frames)
    assert mask.any()
    assert not mask.all()


def test_blocks_as_high_or_long_as_the_spectrogram_hide_spans_or_bands() -> None:
    rng = np.random.default_rng(0)
    spans = draw_mask(rng, 20, 64, MaskedAudioConfig(block_bands=20, block_frames=8))
    assert (spans == spans[:1]).all()
    assert spans[0].sum() == 32
    bands = draw_mask(rng, 20, 64, MaskedAudioConfig(block_bands=5, block_frames=64))
    assert (bands == bands[:, :1]).all()
    assert bands[:, 0].sum() == 10


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_sample_is_masked_alike_in_any_batch(noise: float) -> None:
    objective = MaskedAudio(MaskedAudioConfig(block_bands=4, block_frames=4, noise=noise), 2, 16)
    audio = torch.randn(4, 16, 30)
    whole = objective.draw(sounds(audio))
    part = objective.draw(sounds(audio[[2, 0]], (2, 0)))
    for got, wanted in (
        (part.inputs["audio"].tensor, whole.inputs["audio"].tensor),
        (part.given["mask"], whole.given["mask"]),
        (part.given["target"], whole.given["target"]),
    ):
        assert torch.equal(got, wanted[[2, 0]])
    later = objective.draw(sounds(audio, visit=1))
    assert not torch.equal(later.given["mask"], whole.given["mask"])


def test_only_the_masked_places_change_and_they_get_the_mean_of_the_visible_ones() -> None:
    clean = 5 * torch.randn(3, 16, 30) - 20
    drawn = MaskedAudio(MaskedAudioConfig(block_bands=4, block_frames=4), 2, 16).draw(sounds(clean))
    distorted, mask = drawn.inputs["audio"].tensor, drawn.given["mask"]
    assert drawn.inputs["audio"].modality == "audio"
    assert drawn.inputs["audio"].with_feature_map
    assert torch.equal(distorted[~mask], clean[~mask])
    for sample in range(3):
        filled = distorted[sample][mask[sample]]
        assert (filled == filled[0]).all()
        assert filled[0].item() == pytest.approx(clean[sample][~mask[sample]].mean().item(), rel=1e-5)


def test_noise_has_the_stated_deviation_and_leaves_the_target_clean() -> None:
    clean = 4 * torch.randn(2, 64, 200) + 3
    quiet, noisy = (MaskedAudio(MaskedAudioConfig(noise=noise), 2, 64).draw(sounds(clean)) for noise in (0.0, 0.25))
    assert torch.equal(quiet.given["target"], noisy.given["target"])
    added = noisy.inputs["audio"].tensor - quiet.inputs["audio"].tensor
    # 12,800 places: the relative error of a deviation is 0.6 %; of the sample's own as much.
    assert added.std(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0], rel=0.04)


def test_neither_the_level_nor_the_range_of_a_recording_matters() -> None:
    objective = with_random_last_layer(MaskedAudio(MaskedAudioConfig(block_bands=4, block_frames=4), 2, 16)).double()
    clean = torch.randn(2, 16, 32, dtype=torch.float64)
    feature_map = torch.randn(2, 2, 2, 4, dtype=torch.float64)
    losses = [
        objective(told(objective.draw(sounds(audio)), feature_map)).loss.item()
        for audio in (clean, clean - 11, 6 * clean + 2)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_a_constant_spectrogram_is_reconstructed_exactly_and_stays_so() -> None:
    backbone, _ = build_audio_backbone("tiny", 16)
    objective = MaskedAudio(MaskedAudioConfig(block_bands=4, block_frames=8), 192, 16)
    optimizer = torch.optim.SGD([*objective.parameters(), *backbone.parameters()], lr=1.0)
    levels = torch.tensor([-13.815511, 0.1, 3.3333])[:, None, None]
    assert isinstance(backbone, Backbone)
    for _ in range(3):
        drawn = objective.draw(sounds(levels.expand(3, 16, 37).contiguous()))
        assert torch.equal(drawn.inputs["audio"].tensor, levels.expand(3, 16, 37))
        result = objective(told(drawn, backbone.feature_map(drawn.inputs["audio"].tensor)))
        assert result.loss.item() == 0
        assert result.metrics["explained"].isnan()  # there is nothing to explain
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()


def test_untrained_it_explains_nothing_and_a_nearly_silent_recording_is_not_blown_up() -> None:
    objective = MaskedAudio(MaskedAudioConfig(), 2, 32)
    drawn = objective.draw(sounds(torch.stack([torch.randn(32, 64), 1e-4 * torch.randn(32, 64) - 13.8])))
    assert drawn.given["target"][1].abs().max() < 0.01
    result = objective(told(drawn, torch.randn(2, 2, 4, 8)))
    assert result.metrics["explained"].item() == 0
    assert result.metrics["l1"].item() == result.metrics["baseline"].item() > 0


@pytest.mark.parametrize("name", ["tiny", "small", "resnet18", "resnet18_1d"])
@pytest.mark.parametrize("frames", [50, 101])
def test_every_backbone_is_decoded_to_the_size_of_its_input(name: str, frames: int) -> None:
    backbone, _ = build_audio_backbone(name, 20)
    assert isinstance(backbone, Backbone)
    objective = with_random_last_layer(
        MaskedAudio(MaskedAudioConfig(block_bands=10, width=8), backbone.map_channels, 20)
    )
    assert isinstance(objective, DrawingObjective)
    drawn = objective.draw(sounds(torch.randn(2, 20, frames)))
    feature_map = backbone.feature_map(drawn.inputs["audio"].tensor)
    decoded = objective.decode(feature_map, frames)
    assert decoded.shape == (2, 20, frames)
    assert decoded.std(dim=1).min() > 0  # the bands differ, also from a map without frequency
    objective(told(drawn, feature_map)).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in objective.parameters())
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in backbone.parameters())


def test_the_loss_is_in_float32_under_autocast() -> None:
    objective = with_random_last_layer(MaskedAudio(MaskedAudioConfig(block_bands=4), 2, 16))
    drawn = objective.draw(sounds(torch.randn(2, 16, 40)))
    feature_map = torch.randn(2, 2, 2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = objective(told(drawn, feature_map)).loss
    assert under.dtype == torch.float32
    assert under.item() == objective(told(drawn, feature_map)).loss.item()


def spectrograms(rng: np.random.Generator, low_rank: bool) -> Tensor:
    """16 spectrograms of 32 bands and 64 frames: two fixed bumps over the bands that swell and fade, or white noise."""
    if not low_rank:
        return torch.from_numpy(rng.standard_normal((16, 32, 64), dtype=np.float32))
    bands, frames = np.arange(32)[None], np.arange(64)
    profiles = np.exp(-(((bands - np.array([[9], [22]])) / 5) ** 2))
    phases, rates = rng.uniform(0, 2 * np.pi, (2, 16, 2, 1))
    swell = np.sin(phases + frames * (0.05 + 0.02 * rates))
    return torch.from_numpy(np.einsum("smt,mb->sbt", 2 * swell, profiles).astype(np.float32))


@pytest.mark.parametrize("low_rank", [True, False])
def test_structure_is_learnt_and_noise_is_not(low_rank: bool) -> None:
    backbone, _ = build_audio_backbone("tiny", 32)
    assert isinstance(backbone, Backbone)
    objective = MaskedAudio(MaskedAudioConfig(block_bands=8, block_frames=8, width=32), 192, 32)
    optimizer = torch.optim.Adam([*objective.parameters(), *backbone.parameters()], lr=3e-3)
    rng = np.random.default_rng(0)
    explained = []
    for step in range(40):
        drawn = objective.draw(sounds(spectrograms(rng, low_rank), visit=step))  # new ones at each step
        result = objective(told(drawn, backbone.feature_map(drawn.inputs["audio"].tensor)))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        explained.append(result.metrics["explained"].item())
    assert explained[0] == 0
    reached = np.mean(explained[-5:])
    assert reached > 0.3 if low_rank else abs(reached) < 0.03, explained


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"masked_share": 0.0}, r"objective.masked_audio.masked_share must be in \(0, 1\), got 0.0"),
        ({"masked_share": 1.0}, r"masked_share must be in \(0, 1\), got 1.0"),
        ({"masked_share": math.nan}, r"masked_share must be in \(0, 1\), got nan"),
        ({"block_bands": 0}, "objective.masked_audio.block_bands must be at least 1, got 0"),
        ({"block_frames": -2}, "block_frames must be at least 1, got -2"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"noise": -0.5}, "noise must be at least 0 and finite, got -0.5"),
        ({"visible_weight": math.inf}, "visible_weight must be at least 0 and finite, got inf"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAudioConfig(**wrong)  # type: ignore[arg-type]


def test_waveforms_other_bands_and_a_missing_map_are_refused() -> None:
    objective = MaskedAudio(MaskedAudioConfig(), 2, 32)
    for audio in (torch.zeros(2, 16_000), torch.zeros(2, 80, 101)):
        with pytest.raises(ValueError, match=r"must be spectrograms \(M, 32, time\), got \(2, "):
            objective.draw(sounds(audio))
    drawn = objective.draw(sounds(torch.randn(2, 32, 40)))
    with pytest.raises(ValueError, match="must come with their feature map, got none"):
        objective(told(drawn, None))
