"""Catch the patch (Wang et al., 2021, CVPR): from where a pasted patch is in the first frame, predict its later boxes.

    loss = mean over patches and frames of sum over (x, y, width, height) of SmoothL1(predicted - true code)

The code of a box is its centre's move from that of the first box, and the logarithm of its size over the first one's.
No sound is needed. The patches are drawn and pasted by `cmacc.objectives.ctp_patches`.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.objectives.ctp_patches import PAPER_SIDE, CatchThePatchConfig, draw_tracks, paste
from cmacc.objectives.objective import BatchViews, Drawn, ExtraInput, ObjectiveInputs, ObjectiveResult

__all__ = ["CatchThePatch", "CatchThePatchConfig", "TrackHead", "decode_boxes", "encode_boxes", "iou", "track_loss"]

MOVE_UNIT = 0.8  # pixels, in a frame whose shorter side has 112
GROWTH_UNIT = 0.04
_TIME_BINS = 8
_REGION = 5  # cells, along either axis
_SAMPLES = 2  # of a cell, along either axis


class CatchThePatch(nn.Module):
    """Paste moving patches onto the clips, and predict each patch's boxes from its first one and the feature map.

    Parameters
    ----------
    config
        Settings.
    map_channels
        C of the video backbone's feature map ``(M, C, T', H', W')``.
    frame_count
        T, frames of a clip; at least 2.

    Notes
    -----
    Metrics: ``loss``; ``iou``, the mean intersection over union of predicted and true boxes over all frames but the
    first; ``iou_staying``, the same of a box that stays where it is in the first frame. A head that has learned nothing
    predicts that.
    """

    needs_keys = False
    needs_feature_maps = False  # of the queries: only the pasted clips' maps are needed

    def __init__(self, config: CatchThePatchConfig, map_channels: int, frame_count: int) -> None:
        super().__init__()
        if frame_count < 2:
            raise ValueError(f"CatchThePatch: frame_count must be at least 2, got {frame_count}")
        self.config = config
        self.frame_count = frame_count
        self.head = TrackHead(map_channels, frame_count, config.channels, config.hidden)

    def draw(self, batch: BatchViews) -> Drawn:
        """The augmented clips with patches, and the patches' boxes.

        Raises
        ------
        ValueError
            The clips do not have ``frame_count`` frames, or their frames are smaller than 16 pixels.
        """
        video = batch.inputs["video"]
        clips, _, frames, height, width = video.shape
        if frames != self.frame_count:
            raise ValueError(f"CatchThePatch: clips must have {self.frame_count} frames, got {frames}")
        tracks = [draw_tracks(self.config, rng, frames, height, width) for rng in batch.generators("ctp")]
        boxes = torch.from_numpy(np.stack([of_clip.boxes for of_clip in tracks]))
        return Drawn(
            {"pasted": ExtraInput("video", paste(video, tracks), with_feature_map=True)},
            {
                "boxes": boxes.to(video.device, torch.float32),
                # A row for each clip, because what is drawn is gathered by rows.
                "frame_size": torch.tensor([[width, height]], device=video.device).float().repeat(clips, 1),
            },
        )

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The loss of predicted tracks."""
        feature_map = inputs.more["pasted"].feature_map
        assert feature_map is not None
        # At least float32, also under autocast: RoIAlign has no half precision on CPUs, and boxes need the digits.
        dtype = torch.promote_types(feature_map.dtype, torch.float32)
        boxes, frame_size = inputs.given["boxes"].to(dtype), inputs.given["frame_size"].to(dtype)
        first, side = boxes[:, :, 0], frame_size.amin(1)
        with torch.autocast(feature_map.device.type, enabled=False):
            codes = self.head(feature_map.to(dtype), first, frame_size)
            loss = track_loss(codes, encode_boxes(boxes, side))
            with torch.no_grad():
                predicted = decode_boxes(codes, first, side)
                metrics = {
                    "loss": loss.detach(),
                    "iou": iou(predicted, boxes)[:, :, 1:].mean(),
                    "iou_staying": iou(first[:, :, None].expand_as(boxes), boxes)[:, :, 1:].mean(),
                }
        return ObjectiveResult(loss, metrics)


class TrackHead(nn.Module):
    """From a feature map and boxes in the first frame to the codes of the boxes in all frames.

    The map's time is averaged into eight bins (repeated, if it has fewer), which one convolution joins; where something
    happens in time then still counts, as in the paper, whose map has two time steps. RoIAlign cuts 5 x 5 cells from the
    first box; two linear layers follow.

    Parameters
    ----------
    map_channels
        C of the feature map.
    frame_count
        T.
    channels
        Channels after the convolution.
    hidden
        Width of the hidden layer.
    """

    def __init__(self, map_channels: int, frame_count: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.frame_count = frame_count
        self.over_time = nn.Conv3d(map_channels, channels, (_TIME_BINS, 1, 1))
        # Without a norm, the first steps of Adam move the sums over thousands of inputs so far that all units die.
        self.hidden = nn.Sequential(nn.Linear(channels * _REGION**2, hidden), nn.LayerNorm(hidden), nn.ReLU())
        self.codes = nn.Linear(hidden, frame_count * 4)
        nn.init.kaiming_normal_(self.over_time.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.over_time.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.codes.weight, std=0.001)  # the first predictions are that boxes stay
        nn.init.zeros_(self.codes.bias)

    def forward(
        self,
        feature_map: Float[Tensor, "batch channels map_time map_height map_width"],
        first_boxes: Float[Tensor, "batch patches 4"],
        frame_size: Float[Tensor, "batch 2"],
    ) -> Float[Tensor, "batch patches time 4"]:
        """Codes.

        Parameters
        ----------
        feature_map
            ``(M, C, T', H', W')`` for any T', H', W'.
        first_boxes
            ``(M, patches, 4)``: left, top, right, bottom in pixels.
        frame_size
            ``(M, 2)``: width and height in pixels.
        """
        from torchvision.ops import roi_align  # importing torchvision takes seconds

        clips, patches = first_boxes.shape[:2]
        binned = functional.adaptive_avg_pool3d(feature_map, (_TIME_BINS, *feature_map.shape[3:]))
        cells = functional.relu(self.over_time(binned)).squeeze(2)
        # From pixels to cells along each axis; RoIAlign takes one scale for both.
        map_size = frame_size.new_tensor(cells.shape[:1:-1])
        regions = first_boxes * (map_size / frame_size).repeat(1, 2)[:, None]
        clip = torch.arange(clips, device=cells.device).repeat_interleave(patches, output_size=clips * patches)
        regions = torch.cat([clip[:, None].to(regions), regions.flatten(0, 1)], dim=1)
        cut: Tensor = roi_align(cells, regions, _REGION, sampling_ratio=_SAMPLES, aligned=True)
        codes: Tensor = self.codes(self.hidden(cut.flatten(1)))
        return codes.view(clips, patches, self.frame_count, 4)


def track_loss(
    codes: Float[Tensor, "batch patches time 4"], targets: Float[Tensor, "batch patches time 4"]
) -> Float[Tensor, ""]:
    """Smooth L1 (beta 1), summed over the four parts of a code, averaged over boxes and frames."""
    return functional.smooth_l1_loss(codes, targets, reduction="none").sum(-1).mean()


def encode_boxes(
    boxes: Float[Tensor, "batch patches time 4"], side: Float[Tensor, " batch"]
) -> Float[Tensor, "batch patches time 4"]:
    """The codes of boxes with respect to the first frame's.

    Parameters
    ----------
    boxes
        Left, top, right, bottom in pixels; not empty.
    side
        ``(M,)``: the shorter side of the frames in pixels.

    Returns
    -------
    Tensor
        The centre's moves along x and y in units of 0.8 pixels of a frame with a shorter side of 112, then the
        logarithms of the width's and height's ratios in units of 0.04. Zeros in the first frame.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    move = (centre - centre[:, :, :1]) / _move_unit(side)
    growth = (size / size[:, :, :1]).log() / GROWTH_UNIT
    return torch.cat([move, growth], dim=-1)


def decode_boxes(
    codes: Float[Tensor, "batch patches time 4"],
    first_boxes: Float[Tensor, "batch patches 4"],
    side: Float[Tensor, " batch"],
) -> Float[Tensor, "batch patches time 4"]:
    """The inverse of `encode_boxes`, from the first frame's boxes ``(M, patches, 4)``."""
    first = first_boxes[:, :, None]
    centre = (first[..., :2] + first[..., 2:]) / 2 + codes[..., :2] * _move_unit(side)
    size = (first[..., 2:] - first[..., :2]) * (codes[..., 2:] * GROWTH_UNIT).exp()
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def iou(boxes: Float[Tensor, "*rows 4"], others: Float[Tensor, "*rows 4"]) -> Float[Tensor, "*rows"]:
    """Intersection over union of each box with the other one of its row; 0 to 1. The boxes must not be empty."""
    start, end = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (end - start).clamp(min=0).prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1)
    return shared / (areas - shared)


def _move_unit(side: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1 1 1"]:
    return (side * (MOVE_UNIT / PAPER_SIDE))[:, None, None, None]
