"""Reconstruct the frames from a still frame and the sound, to learn the sound's encoder.

After Shukla et al. (2020). Only abstracts are public, so network, loss and constants are our own design. The still
frame tells who and where, so that the sound only has to tell what moves. The result is the still frame plus a residual
whose last layer starts at zero: training starts from "nothing moves", and a clip in which nothing moves costs nothing.

There is no face detector: the mouth is expected in one region of all frames, as in GRID, where faces are centred.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.objectives.objective import BatchViews, Drawn, ObjectiveInputs, ObjectiveResult

_SOUND_BANDS = 4  # of the feature map: the mean over all of frequency would lose which vowel it is
_SOUND_SIZE = 64
_LEAST_CHANGE = 1e-3  # normalised pixels; a batch in which less moves than rounding shall not count for more


@dataclass(frozen=True)
class FaceConfig:
    """The reconstructed frames and the weight of the mouth.

    Parameters
    ----------
    size
        Height and width of the reconstructed frames in pixels, a multiple of 4. Frames that are not square are
        squeezed.
    frames_per_clip
        Number of reconstructed frames, evenly spaced over the clip; at most those that there are.
    region_weight
        Weight of the pixels in the region against 1 elsewhere, at least 1.
    region_top, region_left, region_bottom, region_right
        The region, as shares of height and width. The default holds the mouth and jaw of GRID's speakers.
    width
        Channels of the networks at half the size; twice as many at a quarter.
    """

    size: int = 32
    frames_per_clip: int = 8
    region_weight: float = 4.0
    region_top: float = 0.6
    region_left: float = 0.25
    region_bottom: float = 0.95
    region_right: float = 0.75
    width: int = 16

    def __post_init__(self) -> None:
        settings = dataclasses.asdict(self)
        if self.size < 4 or self.size % 4:
            raise ValueError(f"objective.face.size must be a positive multiple of 4, got {self.size}")
        for name in ("frames_per_clip", "width"):
            if settings[name] < 1:
                raise ValueError(f"objective.face.{name} must be at least 1, got {settings[name]}")
        if not 1 <= self.region_weight < math.inf:
            raise ValueError(f"objective.face.region_weight must be at least 1 and finite, got {self.region_weight}")
        for low, high in (("region_top", "region_bottom"), ("region_left", "region_right")):
            if not 0 <= settings[low] < settings[high] <= 1:
                raise ValueError(
                    f"objective.face.{low} and {high} must be increasing shares in [0, 1], "
                    f"got {settings[low]} and {settings[high]}"
                )


class FaceReconstruction(nn.Module):
    """The frames of a clip from one of its frames and the sound.

    Parameters
    ----------
    config
        Settings.
    map_channels
        C, channels of the audio encoder's feature map ``(M, C, F', T')`` or ``(M, C, T')``.
    audio_span
        The share of the audio window that the video covers: ``(0.25, 0.75)`` for a clip of 1 s in the middle of 2 s of
        sound.

    Raises
    ------
    ValueError
        ``audio_span`` is not two increasing numbers in [0, 1].

    Notes
    -----
    The loss is the weighted mean over pixels of ``|reconstructed - true|``, as a share of that of repeating the still
    frame: 1 before training, whether a mouth moves or a whole picture.

    Metrics, all without the weights and in normalised pixels, except ``loss``: ``l1``, the error of all pixels;
    ``l1_region``, that in the region; ``l1_still``, that of repeating the still frame; ``l1_other_sound``, that with
    the sound of another sample of the batch. If the last is not above ``l1``, the reconstruction does not use the
    sound.
    """

    needs_keys = False
    needs_feature_maps = True
    pixel_weights: Tensor

    def __init__(self, config: FaceConfig, map_channels: int, audio_span: tuple[float, float] = (0.25, 0.75)) -> None:
        super().__init__()
        if not 0 <= audio_span[0] < audio_span[1] <= 1:
            raise ValueError(
                f"FaceReconstruction: audio_span must be two increasing shares in [0, 1], got {audio_span}"
            )
        self.config = config
        self.audio_span = audio_span
        width, quarter = config.width, config.size // 4
        self.still_half = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1)
        self.still_quarter = nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1)
        # To a map, not to channels alone: what the sound changes is at a certain place of the picture.
        self.sound = nn.Sequential(
            nn.Linear(_SOUND_BANDS * map_channels, _SOUND_SIZE),
            nn.ReLU(),
            nn.Linear(_SOUND_SIZE, 2 * width * quarter**2),
            nn.Unflatten(-1, (2 * width, quarter, quarter)),
        )
        self.mix_quarter = nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1)
        self.mix_half = nn.Conv2d(3 * width, width, kernel_size=3, padding=1)
        self.last = nn.Conv2d(width, 3 * 2**2, kernel_size=3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)
        self.register_buffer("pixel_weights", _pixel_weights(config), persistent=False)

    def draw(self, batch: BatchViews) -> Drawn:
        """Given: ``frames`` ``(M, 3, T', S, S)`` and ``still`` ``(M, 3, S, S)``, a frame drawn at random."""
        video = batch.plain("video")
        samples, frames = len(video), video.shape[2]
        count = min(self.config.frames_per_clip, frames)
        even = [int((number + 0.5) * frames / count) for number in range(count)]
        stills = [int(rng.integers(frames)) for rng in batch.generators("face")]
        # Resized in one call, so that equal frames stay equal to the last bit.
        chosen = torch.tensor([[still, *even] for still in stills], device=video.device)
        rows = torch.arange(samples, device=video.device)[:, None]
        picked = video.transpose(1, 2)[rows, chosen]
        size = self.config.size
        small = functional.adaptive_avg_pool2d(picked.flatten(0, 1), (size, size)).unflatten(0, (samples, count + 1))
        return Drawn(given={"frames": small[:, 1:].transpose(1, 2), "still": small[:, 0]})

    def reconstruct(
        self, still: Float[Tensor, "batch 3 size size"], sound: Float[Tensor, "batch frames features"]
    ) -> Float[Tensor, "batch 3 frames size size"]:
        """The still frame changed by the sound of each frame."""
        half = functional.relu(self.still_half(still))
        quarter = self.still_quarter(half)
        x = functional.relu(quarter[:, None] + self.sound(sound)).flatten(0, 1)
        x = functional.relu(self.mix_quarter(x))
        frames = sound.shape[1]
        x = torch.cat([functional.interpolate(x, scale_factor=2.0), half.repeat_interleave(frames, dim=0)], dim=1)
        x = functional.relu(self.mix_half(x))
        residual = functional.pixel_shuffle(self.last(x), 2).unflatten(0, (len(still), frames))
        changed: Tensor = still[:, None] + residual
        return changed.transpose(1, 2)

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The loss of a batch."""
        feature_map = inputs.queries["audio"].feature_map
        if feature_map is None:
            raise ValueError("FaceReconstruction: the audio query must come with its feature map, got none")
        dtype = self.last.weight.dtype
        # In the precision of the weights, also under autocast.
        with torch.autocast(feature_map.device.type, enabled=False):
            frames, still = inputs.given["frames"].to(dtype), inputs.given["still"].to(dtype)
            sound = sound_of_frames(feature_map.to(dtype), frames.shape[2], self.audio_span)
            error = (self.reconstruct(still, sound) - frames).abs()
            weights = self.pixel_weights.to(dtype)
            unchanged = (still[:, :, None] - frames).abs()
            loss = _weighted(error, weights) / _weighted(unchanged, weights).clamp_min(_LEAST_CHANGE)
            with torch.no_grad():
                other = (self.reconstruct(still, sound.roll(1, dims=0)) - frames).abs().mean()
        with torch.no_grad():
            metrics = {
                "loss": loss.detach(),
                "l1": error.mean(),
                "l1_region": _mean_in_region(error, self.config),
                "l1_still": unchanged.mean(),
                "l1_other_sound": other if len(frames) > 1 else torch.full_like(other, torch.nan),
            }
        return ObjectiveResult(loss, metrics)


def sound_of_frames(
    feature_map: Float[Tensor, "batch channels *places"], frames: int, audio_span: tuple[float, float]
) -> Float[Tensor, "batch frames features"]:
    """What an audio feature map holds at the time of each of ``frames`` evenly spaced frames, linear in time.

    The video covers ``audio_span``, shares of the window. Features are the channels in four frequency bands; a map
    without frequency has all of them alike.
    """
    if feature_map.ndim == 3:
        feature_map = feature_map[:, :, None]
    steps = feature_map.shape[3]
    by_time = functional.adaptive_avg_pool2d(feature_map, (_SOUND_BANDS, steps)).flatten(1, 2)
    start, stop = audio_span
    shares = (torch.arange(frames, device=by_time.device, dtype=by_time.dtype) + 0.5) / frames
    # Step k of the map is the sound around (k + 0.5) / steps of the window.
    places = ((start + (stop - start) * shares) * steps - 0.5).clamp(0, steps - 1)
    hats = (1 - (places[:, None] - torch.arange(steps, device=by_time.device)).abs()).clamp_min(0)
    return (by_time @ hats.T).transpose(1, 2)


def _region(config: FaceConfig) -> tuple[slice, slice]:
    """Rows and columns of the region; at least one pixel each."""
    top, left = (min(round(share * config.size), config.size - 1) for share in (config.region_top, config.region_left))
    bottom, right = (round(share * config.size) for share in (config.region_bottom, config.region_right))
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))


def _pixel_weights(config: FaceConfig) -> Float[Tensor, "size size"]:
    weights = torch.ones(config.size, config.size)
    weights[_region(config)] = config.region_weight
    return weights


def _weighted(
    error: Float[Tensor, "batch 3 frames size size"], weights: Float[Tensor, "size size"]
) -> Float[Tensor, ""]:
    return (error.mean(dim=(0, 1, 2)) * weights).sum() / weights.sum()


def _mean_in_region(error: Float[Tensor, "batch 3 frames size size"], config: FaceConfig) -> Float[Tensor, ""]:
    rows, columns = _region(config)
    return error[..., rows, columns].mean()
