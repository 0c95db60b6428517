"""Catch the patch: codes of boxes, the loss against plain loops, a perfect tracker, and learning."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from cmacc.objectives.ctp import (
    CatchThePatch,
    CatchThePatchConfig,
    TrackHead,
    decode_boxes,
    encode_boxes,
    iou,
    track_loss,
)
from cmacc.objectives.ctp_patches import draw_tracks
from cmacc.objectives.objective import BatchViews, DrawingObjective, Drawn, ObjectiveInputs, ObjectiveResult

from .stand_ins import Embedded, Views

SMALL = CatchThePatchConfig(channels=4, hidden=8)


def true_boxes(clips: int = 3, patches: int = 2, frames: int = 6, height: int = 48, width: int = 64) -> Tensor:
    config = CatchThePatchConfig(patches=patches)
    tracks = [draw_tracks(config, np.random.default_rng(row), frames, height, width) for row in range(clips)]
    return torch.from_numpy(np.stack([of_clip.boxes for of_clip in tracks])).double()


def sides(boxes: Tensor, side: float = 48) -> Tensor:
    return torch.full((len(boxes),), side, dtype=torch.float64)


def result_of(objective: CatchThePatch, drawn: Drawn, feature_map: Tensor) -> ObjectiveResult:
    ids = torch.arange(len(feature_map))
    return objective(ObjectiveInputs({}, {}, {}, ids, {"pasted": Embedded(feature_map=feature_map)}, drawn.given))


def naive_loss(codes: Tensor, boxes: Tensor, side: float) -> float:
    total, count = 0.0, 0
    for of_clip, coded in zip(boxes.tolist(), codes.tolist(), strict=True):
        for track, code in zip(of_clip, coded, strict=True):
            a1, b1, a2, b2 = track[0]
            for (x1, y1, x2, y2), predicted in zip(track, code, strict=True):
                target = (
                    ((x1 + x2) / 2 - (a1 + a2) / 2) * 112 / side / 0.8,
                    ((y1 + y2) / 2 - (b1 + b2) / 2) * 112 / side / 0.8,
                    np.log((x2 - x1) / (a2 - a1)) / 0.04,
                    np.log((y2 - y1) / (b2 - b1)) / 0.04,
                )
                for p, q in zip(predicted, target, strict=True):
                    error = abs(p - q)
                    total += error - 0.5 if error > 1 else error**2 / 2
                count += 1
    return total / count


def test_the_loss_is_that_of_a_plain_loop() -> None:
    boxes = true_boxes()
    codes = 5 * torch.randn(*boxes.shape, dtype=torch.float64)
    loss = track_loss(codes, encode_boxes(boxes, sides(boxes)))
    assert loss.item() == pytest.approx(naive_loss(codes, boxes, 48), rel=1e-12)


def test_boxes_round_trip() -> None:
    boxes = true_boxes(clips=5, patches=4)
    codes = encode_boxes(boxes, sides(boxes))
    assert torch.equal(codes[:, :, 0], torch.zeros_like(codes[:, :, 0]))
    torch.testing.assert_close(decode_boxes(codes, boxes[:, :, 0], sides(boxes)), boxes, rtol=0, atol=1e-12)


def test_codes_by_hand() -> None:
    """At 112 pixels a move of 8 pixels is 10 units; in half the frame, so is half the move. Sizes: ln 2 / 0.04."""
    boxes = torch.tensor([[[[10.0, 20, 20, 30], [13.0, 20, 33, 30]]]], dtype=torch.float64)
    expected = torch.tensor([10.0, 0, np.log(2) / 0.04, 0], dtype=torch.float64)
    torch.testing.assert_close(encode_boxes(boxes, sides(boxes, 112))[0, 0, 1], expected)
    torch.testing.assert_close(encode_boxes(boxes / 2, sides(boxes, 56))[0, 0, 1], expected)


def test_iou_is_that_of_torchvision() -> None:
    boxes = true_boxes(clips=4).flatten(0, 2)
    others = boxes[torch.randperm(len(boxes))]
    torch.testing.assert_close(iou(boxes, others), box_iou(boxes, others).diagonal())
    assert torch.equal(iou(boxes, boxes), torch.ones(len(boxes), dtype=torch.float64))
    apart = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[2.0, 2, 3, 3]])
    assert iou(*apart).item() == 0


class Planted(nn.Module):
    """Predicts given codes."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes = codes

    def forward(self, feature_map: Tensor, first_boxes: Tensor, frame_size: Tensor) -> Tensor:
        return self.codes


@pytest.mark.parametrize("clips", [1, 3])
def test_a_perfect_tracker_has_iou_one_and_no_loss_and_a_resting_one_that_of_staying(clips: int) -> None:
    objective = CatchThePatch(SMALL, 2, frame_count=6)
    drawn = objective.draw(Views({"video": torch.randn(clips, 3, 6, 48, 64)}))
    boxes = drawn.given["boxes"]
    assert boxes.shape == (clips, 3, 6, 4)
    codes = encode_boxes(boxes, torch.full((clips,), 48.0))
    feature_map = torch.zeros(clips, 2, 3, 3, 4)
    objective.head = Planted(codes)  # type: ignore[assignment]
    perfect = result_of(objective, drawn, feature_map).metrics
    assert perfect["loss"] == 0
    assert perfect["iou"].item() == pytest.approx(1, abs=1e-5)
    objective.head = Planted(torch.zeros_like(codes))  # type: ignore[assignment]
    resting = result_of(objective, drawn, feature_map)
    assert resting.metrics["iou"].item() == pytest.approx(resting.metrics["iou_staying"].item(), abs=1e-6)
    still = [box_iou(track[:1], track[1:]).mean().item() for track in boxes.flatten(0, 1)]
    assert resting.metrics["iou_staying"].item() == pytest.approx(np.mean(still), abs=1e-5)
    assert resting.loss.item() == pytest.approx(naive_loss(torch.zeros_like(codes), boxes, 48), rel=1e-5)


def test_what_is_drawn_depends_on_the_samples_generators_only() -> None:
    objective = CatchThePatch(SMALL, 2, frame_count=4)
    assert isinstance(objective, DrawingObjective)
    views: BatchViews = Views({"video": torch.randn(3, 3, 4, 32, 32)})
    together, again = objective.draw(views), objective.draw(views)
    alone = objective.draw(Views({"video": views.inputs["video"][:1]}))
    extra = together.inputs["pasted"]
    assert (extra.modality, extra.with_feature_map) == ("video", True)
    assert torch.equal(extra.tensor, again.inputs["pasted"].tensor)
    assert torch.equal(extra.tensor[:1], alone.inputs["pasted"].tensor)
    for name in ("boxes", "frame_size"):
        assert torch.equal(together.given[name][:1], alone.given[name])


def test_gradients_of_the_head_and_the_loss() -> None:
    head = TrackHead(map_channels=2, frame_count=3, channels=2, hidden=3).double()
    nn.init.normal_(head.codes.weight)  # at its first values, almost nothing reaches the map
    boxes = true_boxes(clips=2, frames=3)
    size, targets = torch.tensor([[64.0, 48.0]] * 2, dtype=torch.float64), encode_boxes(boxes, sides(boxes))
    feature_map = torch.randn(2, 2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(feature_map: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(head.named_parameters()), weights, strict=True))
        codes = torch.func.functional_call(head, named, (feature_map, boxes[:, :, 0], size))
        return track_loss(codes, targets)

    assert torch.autograd.gradcheck(loss, (feature_map, *head.parameters()), fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 4, 4), (8, 7, 7), (1, 3, 5), (16, 2, 9)])
def test_maps_of_any_size_will_do(shape: tuple[int, ...]) -> None:
    head = TrackHead(map_channels=3, frame_count=5, channels=4, hidden=8)
    boxes = true_boxes(clips=2, frames=5).float()
    codes = head(torch.randn(2, 3, *shape), boxes[:, :, 0], torch.tensor([[64.0, 48.0]] * 2))
    assert codes.shape == (2, 2, 5, 4)


def test_regions_are_where_the_boxes_are() -> None:
    """A linear ramp over the map is read at the boxes' places: along each axis by its own scale."""
    head = TrackHead(map_channels=2, frame_count=2, channels=2, hidden=50)
    with torch.no_grad():
        head.over_time.weight.copy_(torch.eye(2)[..., None, None, None].expand_as(head.over_time.weight) / 8)
        head.hidden = nn.Sequential(nn.ReLU())  # without the linear layer and the norm
        head.codes.weight.zero_()
        # Output: the mean over the region of the map's first channel, then of its second.
        head.codes.weight[0, :25] = head.codes.weight[1, 25:] = 1 / 25
    rows, columns = torch.meshgrid(torch.arange(6.0) + 0.5, torch.arange(16.0) + 0.5, indexing="ij")
    feature_map = torch.stack([columns, rows])[None, :, None].expand(1, 2, 4, 6, 16)
    boxes = torch.tensor([[[16.0, 16, 32, 32], [40.0, 8, 100, 24]]])
    codes = head(feature_map, boxes, torch.tensor([[128.0, 48.0]]))[0, :, 0]
    centres = (boxes[0, :, :2] + boxes[0, :, 2:]) / 2
    torch.testing.assert_close(codes[:, :2], centres / 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_under_autocast(dtype: torch.dtype) -> None:
    objective = CatchThePatch(SMALL, 2, frame_count=4)
    drawn = objective.draw(Views({"video": torch.randn(2, 3, 4, 32, 32)}))
    feature_map = torch.randn(2, 2, 2, 2, 2).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        result = result_of(objective, drawn, feature_map)
    whole = result_of(objective, drawn, feature_map.detach().float())
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, whole.loss)
    result.loss.backward()
    assert feature_map.grad is not None
    assert feature_map.grad.isfinite().all()


def test_clips_of_another_length_are_refused() -> None:
    objective = CatchThePatch(SMALL, 2, frame_count=4)
    with pytest.raises(ValueError, match="clips must have 4 frames, got 5"):
        objective.draw(Views({"video": torch.randn(1, 3, 5, 32, 32)}))
    with pytest.raises(ValueError, match="frame_count must be at least 2, got 1"):
        CatchThePatch(SMALL, 2, frame_count=1)


def noise(seed: int) -> Views:
    """Noise that grows brighter with time, so that a patch from another frame can be seen."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.arange(4.0).sub(1.5)[:, None, None]
    return Views({"video": 0.1 * torch.randn(16, 3, 4, 32, 32, generator=generator) + brightness}, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_small_network_learns_to_follow_patches(shuffled: bool) -> None:
    """On clips and tracks that it has not seen, its boxes overlap the true ones clearly more than staying ones.

    Not so if it learns from the boxes of other clips, as with ``data.shuffle_pairs``.
    """
    network = nn.Sequential(
        nn.Conv3d(3, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 32, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(32), nn.ReLU(),
    )  # fmt: skip
    objective = CatchThePatch(CatchThePatchConfig(channels=32, hidden=128, visible=1.0), 32, frame_count=4)
    optimizer = torch.optim.AdamW([*network.parameters(), *objective.parameters()], lr=0.003)
    for step in range(70):
        drawn = objective.draw(noise(step))
        if shuffled:
            drawn = Drawn(drawn.inputs, {name: rows.roll(2, dims=0) for name, rows in drawn.given.items()})
        optimizer.zero_grad()
        result_of(objective, drawn, network(drawn.inputs["pasted"].tensor)).loss.backward()
        optimizer.step()
    network.eval()
    held_out = [objective.draw(noise(seed)) for seed in range(1000, 1005)]
    with torch.no_grad():
        metrics = [result_of(objective, drawn, network(drawn.inputs["pasted"].tensor)).metrics for drawn in held_out]
    tracked, staying = (np.mean([each[name].item() for each in metrics]) for name in ("iou", "iou_staying"))
    assert tracked < staying + 0.02 if shuffled else tracked > staying + 0.05
