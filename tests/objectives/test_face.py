"""Frames from a still frame and the sound: against plain loops, and that the sound is used only where it tells."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmacc.encoders.audio import build_audio_backbone
from cmacc.encoders.backbone import Backbone
from cmacc.objectives.face import FaceConfig, FaceReconstruction, sound_of_frames
from cmacc.objectives.objective import DrawingObjective, Drawn, ObjectiveInputs

from .stand_ins import Embedded, Views


def clips(video: Tensor, sample_ids: tuple[int, ...] | None = None, visit: int = 0) -> Views:
    return Views({"video": video}, sample_ids, visit)


def told(drawn: Drawn, feature_map: Tensor | None) -> ObjectiveInputs:
    ids = torch.arange(len(drawn.given["still"]))
    return ObjectiveInputs({"audio": Embedded(feature_map=feature_map)}, {}, {}, ids, given=drawn.given)


def with_random_last_layer(objective: FaceReconstruction) -> FaceReconstruction:
    nn.init.normal_(objective.last.weight)
    assert objective.last.bias is not None
    nn.init.normal_(objective.last.bias)
    return objective


def convolved(layer: nn.Conv2d, x: np.ndarray) -> np.ndarray:
    """A 3 x 3 convolution with a border of zeros, place by place."""
    assert layer.bias is not None
    weight, bias, step = layer.weight.detach().numpy(), layer.bias.detach().numpy(), layer.stride[0]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    rows, columns = (math.ceil(size / step) for size in x.shape[1:])
    out = np.zeros((len(weight), rows, columns))
    for row in range(rows):
        for column in range(columns):
            around = padded[:, step * row : step * row + 3, step * column : step * column + 3]
            out[:, row, column] = [(kernel * around).sum() for kernel in weight] + bias
    return out


def naive_sound(feature_map: np.ndarray, frames: int, span: tuple[float, float]) -> np.ndarray:
    """``(M, frames, 4 C)`` for a map of four rows: linear interpolation between the middles of the map's steps."""
    samples, channels, rows, steps = feature_map.shape
    middles = (np.arange(steps) + 0.5) / steps
    at = [span[0] + (span[1] - span[0]) * (number + 0.5) / frames for number in range(frames)]
    out = np.zeros((samples, frames, channels * rows))
    for sample in range(samples):
        for channel in range(channels):
            for row in range(rows):
                out[sample, :, channel * rows + row] = np.interp(at, middles, feature_map[sample, channel, row])
    return out


def naive_frame(objective: FaceReconstruction, still: np.ndarray, sound: np.ndarray) -> np.ndarray:
    first, second = objective.sound[0], objective.sound[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    hidden = np.maximum(first.weight.detach().numpy() @ sound + first.bias.detach().numpy(), 0)
    half = np.maximum(convolved(objective.still_half, still), 0)
    quarter = convolved(objective.still_quarter, half)
    change = (second.weight.detach().numpy() @ hidden + second.bias.detach().numpy()).reshape(quarter.shape)
    x = np.maximum(convolved(objective.mix_quarter, np.maximum(quarter + change, 0)), 0)
    x = np.concatenate([x.repeat(2, axis=1).repeat(2, axis=2), half])
    x = convolved(objective.last, np.maximum(convolved(objective.mix_half, x), 0))
    out = still.copy()
    for colour in range(3):
        for row in range(still.shape[1]):
            for column in range(still.shape[2]):
                out[colour, row, column] += x[4 * colour + 2 * (row % 2) + column % 2, row // 2, column // 2]
    return out


def test_the_loss_is_that_of_plain_loops_in_float64() -> None:
    config = FaceConfig(size=8, frames_per_clip=3, region_weight=3.0, width=2)
    span = (0.2, 0.9)
    objective = with_random_last_layer(FaceReconstruction(config, 2, span)).double()
    drawn = objective.draw(clips(torch.randn(3, 3, 6, 16, 16, dtype=torch.float64)))
    feature_map = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    result = objective(told(drawn, feature_map))

    frames, stills = drawn.given["frames"].numpy(), drawn.given["still"].numpy()
    sound = naive_sound(feature_map.numpy(), 3, span)
    total = unchanged = 0.0
    all_errors, region, repeated, others = [], [], [], []
    for sample in range(3):
        for number in range(3):
            true = frames[sample, :, number]
            error = np.abs(naive_frame(objective, stills[sample], sound[sample, number]) - true)
            others.append(np.abs(naive_frame(objective, stills[sample], sound[sample - 1, number]) - true))
            repeated.append(np.abs(stills[sample] - true))
            all_errors.append(error)
            for colour in range(3):
                for row in range(8):
                    for column in range(8):
                        inside = 0.6 * 8 <= row + 0.5 < 0.95 * 8 + 0.5 and 0.25 * 8 <= column < 0.75 * 8
                        weight = 3.0 if inside else 1.0
                        total += weight * error[colour, row, column]
                        unchanged += weight * repeated[-1][colour, row, column]
                        if inside:
                            region.append(error[colour, row, column])
    assert result.loss.item() == pytest.approx(total / unchanged, rel=1e-12)
    wanted = {
        "loss": total / unchanged,
        "l1": np.mean(all_errors),
        "l1_region": np.mean(region),
        "l1_still": np.mean(repeated),
        "l1_other_sound": np.mean(others),
    }
    assert {name: value.item() for name, value in result.metrics.items()} == pytest.approx(wanted, rel=1e-12)
    assert not any(value.requires_grad for value in result.metrics.values())


@pytest.mark.parametrize("places", [(4, 3), (5, 2), (3,)])
def test_the_gradient_is_that_of_differences(places: tuple[int, ...]) -> None:
    objective = with_random_last_layer(FaceReconstruction(FaceConfig(size=4, frames_per_clip=2, width=1), 2)).double()
    drawn = objective.draw(clips(torch.randn(2, 3, 3, 6, 6, dtype=torch.float64)))
    feature_map = torch.randn(2, 2, *places, dtype=torch.float64, requires_grad=True)
    names, values = zip(*objective.named_parameters(), strict=True)

    def loss(feature_map: Tensor, *weights: Tensor) -> Tensor:
        replaced = dict(zip(names, weights, strict=True))
        outcome = torch.func.functional_call(objective, replaced, (told(drawn, feature_map),))
        assert isinstance(outcome.loss, Tensor)
        return outcome.loss

    # Every weight by itself would take 20 s: along random directions instead, and every place of the map by itself.
    assert gradcheck(loss, (feature_map, *values), fast_mode=True)
    assert gradcheck(loss, (feature_map, *(value.detach() for value in values)))


def test_the_frames_are_evenly_spaced_and_the_still_one_is_any_of_all() -> None:
    video = torch.arange(16.0)[None, None, :, None, None].expand(200, 3, 16, 8, 8)
    objective = FaceReconstruction(FaceConfig(size=4, frames_per_clip=4), 2)
    given = objective.draw(clips(video)).given
    assert given["frames"].shape == (200, 3, 4, 4, 4)
    assert given["frames"][:, 0, :, 0, 0].unique(dim=0).tolist() == [[2, 6, 10, 14]]
    # One of 16 frames stays out of 200 draws with a chance of at most 16 (15/16)^200 = 4e-5.
    assert given["still"].shape == (200, 3, 4, 4)
    assert given["still"][:, 0, 0, 0].unique().tolist() == list(range(16))
    few = objective.draw(clips(video[:, :, :3])).given["frames"]
    assert few[0, 0, :, 0, 0].tolist() == [0, 1, 2]


def test_frames_are_averaged_down_and_squeezed_to_a_square() -> None:
    video = torch.randn(1, 3, 2, 8, 12)
    frames = FaceReconstruction(FaceConfig(size=4, frames_per_clip=2), 2).draw(clips(video)).given["frames"]
    wanted = video.reshape(1, 3, 2, 4, 2, 4, 3).mean(dim=(4, 6))
    assert torch.allclose(frames, wanted, atol=1e-6)


def test_a_sample_has_the_same_still_frame_in_any_batch() -> None:
    objective = FaceReconstruction(FaceConfig(size=8), 2)
    video = torch.randn(6, 3, 16, 8, 8)
    whole, part = objective.draw(clips(video)), objective.draw(clips(video[[4, 1]], (4, 1)))
    for name in ("still", "frames"):
        assert torch.equal(part.given[name], whole.given[name][[4, 1]])
    assert not torch.equal(objective.draw(clips(video, visit=1)).given["still"], whole.given["still"])


def test_the_sound_of_a_frame_is_that_of_its_time() -> None:
    """A map whose value is its own time tells the times of the frames."""
    steps = (torch.arange(20) + 0.5) / 20
    for feature_map in (steps.expand(1, 3, 5, 20), steps.expand(1, 3, 20)):
        sound = sound_of_frames(feature_map.contiguous(), 5, (0.25, 0.75))
        assert sound.shape == (1, 5, 12)
        assert sound[0, :, 0].tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    # At the ends, the first and the last step go on.
    ends = sound_of_frames(torch.tensor([1.0, 2.0]).expand(1, 1, 2), 10, (0.0, 1.0))[0, :, 0].tolist()
    assert ends[:3] == [1, 1, 1]
    assert ends[-3:] == [2, 2, 2]


def test_a_clip_in_which_nothing_moves_is_reconstructed_exactly_and_stays_so() -> None:
    objective = FaceReconstruction(FaceConfig(size=16, width=4), 2)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    video = torch.randn(4, 3, 1, 36, 36).expand(4, 3, 16, 36, 36)
    for step in range(3):
        result = objective(told(objective.draw(clips(video, visit=step)), torch.randn(4, 2, 4, 9)))
        assert {name: value.item() for name, value in result.metrics.items()} == dict.fromkeys(result.metrics, 0.0)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()


def test_repeating_the_still_frame_is_where_training_starts() -> None:
    objective = FaceReconstruction(FaceConfig(size=8, width=2), 2)
    metrics = objective(told(objective.draw(clips(torch.randn(3, 3, 16, 8, 8))), torch.randn(3, 2, 4, 9))).metrics
    assert metrics["l1"].item() == metrics["l1_still"].item() == metrics["l1_other_sound"].item() > 0


def test_a_sample_alone_has_no_other_sound() -> None:
    objective = FaceReconstruction(FaceConfig(size=8, width=2), 2)
    result = objective(told(objective.draw(clips(torch.randn(1, 3, 4, 8, 8))), torch.randn(1, 2, 4, 9)))
    assert result.metrics["l1_other_sound"].isnan()
    assert result.loss.isfinite()


@pytest.mark.parametrize("name", ["tiny", "small", "resnet18", "resnet18_1d"])
def test_every_audio_backbone_gets_a_gradient(name: str) -> None:
    backbone, _ = build_audio_backbone(name, 20)
    assert isinstance(backbone, Backbone)
    objective = with_random_last_layer(FaceReconstruction(FaceConfig(size=8, width=2), backbone.map_channels))
    assert isinstance(objective, DrawingObjective)
    drawn = objective.draw(clips(torch.randn(2, 3, 8, 16, 16)))
    assert not any(tensor.requires_grad for tensor in drawn.given.values())
    objective(told(drawn, backbone.feature_map(torch.randn(2, 20, 101)))).loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in objective.parameters())
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in backbone.parameters())


def test_the_loss_is_in_float32_under_autocast() -> None:
    objective = with_random_last_layer(FaceReconstruction(FaceConfig(size=8, width=2), 2))
    drawn, feature_map = objective.draw(clips(torch.randn(2, 3, 8, 16, 16))), torch.randn(2, 2, 4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = objective(told(drawn, feature_map)).loss
    assert under.dtype == torch.float32
    assert under.item() == objective(told(drawn, feature_map)).loss.item()


def speakers(rng: np.random.Generator, count: int = 8) -> tuple[Tensor, Tensor]:
    """Clips of 4 frames and sounds of 8 segments: the mouth is as bright as the middle four segments are loud."""
    loud = rng.uniform(-1, 1, (count, 8)).astype(np.float32)
    video = np.repeat(rng.standard_normal((count, 3, 1, 16, 16), dtype=np.float32), 4, axis=2)
    video[..., 10:15, 4:12] = 0.3 * video[..., 10:15, 4:12] + 2 * loud[:, None, 2:6, None, None]
    audio = np.repeat(2 * loud, 8, axis=1)[:, None] + 0.1 * rng.standard_normal((count, 16, 64), dtype=np.float32)
    return torch.from_numpy(video), torch.from_numpy(audio)


@pytest.mark.parametrize("paired", [True, False])
def test_what_the_sound_tells_is_learnt_and_shuffled_sounds_tell_nothing(paired: bool) -> None:
    backbone, _ = build_audio_backbone("tiny", 16)
    assert isinstance(backbone, Backbone)
    objective = FaceReconstruction(FaceConfig(size=16, width=8), 192)
    optimizer = torch.optim.Adam([*objective.parameters(), *backbone.parameters()], lr=3e-3)
    rng = np.random.default_rng(0)
    rows = []
    for step in range(100):  # new clips at each step
        video, audio = speakers(rng)
        if not paired:
            audio = audio.roll(1, dims=0)
        result = objective(told(objective.draw(clips(video, visit=step)), backbone.feature_map(audio)))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        rows.append({name: value.item() for name, value in result.metrics.items()})
    reached = {name: np.mean([row[name] for row in rows[-10:]]) for name in rows[0]}
    if paired:
        assert reached["l1"] < 0.7 * reached["l1_still"], reached
        assert reached["l1"] < 0.7 * reached["l1_other_sound"], reached
        assert reached["l1_region"] < 0.6 * rows[0]["l1_region"], reached
    else:
        assert reached["l1"] == pytest.approx(reached["l1_other_sound"], rel=0.05), reached


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "objective.face.size must be a positive multiple of 4, got 0"),
        ({"size": 30}, "size must be a positive multiple of 4, got 30"),
        ({"frames_per_clip": 0}, "objective.face.frames_per_clip must be at least 1, got 0"),
        ({"width": -1}, "width must be at least 1, got -1"),
        ({"region_weight": 0.5}, "region_weight must be at least 1 and finite, got 0.5"),
        ({"region_weight": math.inf}, "region_weight must be at least 1 and finite, got inf"),
        ({"region_top": 0.95}, r"region_top and region_bottom must be increasing shares in .*, got 0.95 and 0.95"),
        ({"region_right": 1.5}, r"region_left and region_right must be increasing shares in .*, got 0.25 and 1.5"),
        ({"region_left": math.nan}, r"region_left and region_right must be increasing shares in .*, got nan and 0.75"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaceConfig(**wrong)  # type: ignore[arg-type]


def test_a_bad_span_and_a_missing_map_are_refused() -> None:
    for span in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match=r"audio_span must be two increasing shares in .*, got"):
            FaceReconstruction(FaceConfig(), 2, span)
    objective = FaceReconstruction(FaceConfig(size=8), 2)
    drawn = objective.draw(clips(torch.randn(2, 3, 4, 8, 8)))
    with pytest.raises(ValueError, match="must come with its feature map, got none"):
        objective(told(drawn, None))
