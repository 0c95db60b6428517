"""Turn what a user searches with into vectors: a video, sound or image file, or a text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cmacc.clips import Clip, ClipBatch, ClipSpec, MediaInfo, decode_clips, probe
from cmacc.pretraining.clip_encoder import MatchingEncoder, Modality
from cmacc.pretraining.features import encode, match, unit_rows
from cmacc.search.table import SearchError
from cmacc.transfer.text import encode_text, text_modalities

By = Literal["video", "audio", "text"]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".jp2", ".tif", ".tiff")
MOST_WINDOWS = 64
ROUNDING_SECONDS = 0.1
_SILENT = 10 ** (-60 / 20)  # of full scale, as in `cmacc scan`


@dataclass(frozen=True)
class Query:
    """What is searched for.

    Attributes
    ----------
    vectors
        ``{what it is: (d,)}``, of unit length. Those of video and audio are in the shared space, and compared with
        both. Those of text are compared with the features of one modality.
    window_count
        Number of windows whose embeddings were averaged.
    notes
        What a user should know about it.
    """

    vectors: dict[tuple[By, Modality | None], Float[np.ndarray, " dim"]]
    window_count: int = 1
    notes: tuple[str, ...] = ()


def query_of_file(
    encoder: MatchingEncoder,
    path: Path,
    hop_seconds: float,
    *,
    at_seconds: float | None = None,
    window: tuple[float, float] | None = None,
    by: Modality | None = None,
) -> Query:
    """The mean embedding of the windows of a file.

    Parameters
    ----------
    encoder
        The encoder of the index.
    path
        A video, a sound, or an image, which is taken for a video that does not move.
    hop_seconds
        Distance of windows.
    at_seconds
        Take one window, with its centre there.
    window
        Take the windows between these two times.
    by
        Search by its picture or its sound alone; by default, by both if it has both.

    Raises
    ------
    SearchError
        The file lacks what is asked for, or the times lie outside of it.
    MediaError
        It does not decode.
    """
    info = probe(path)
    is_image = path.suffix.lower() in IMAGES
    if is_image and (at_seconds is not None or window is not None):
        raise SearchError(f"query {path}: --at and --window choose a part of a video or a sound, got an image")
    notes = [f"{path.name} is an image: it is searched for as a video that does not move"] if is_image else []
    starts = [0.0] if is_image else _starts(path, info, encoder.spec, hop_seconds, at_seconds, window)
    clips = decode_clips(path, starts, encoder.spec)
    if len(starts) == MOST_WINDOWS:
        notes.append(
            f"{path.name}: searched for from {max(0.0, starts[0]):.1f} s on, {MOST_WINDOWS} windows at the most; "
            "choose the part that matters with --window"
        )
    has_picture, has_sound = info.width > 0, info.has_audio
    if has_sound and max(float(clip.waveform.abs().max()) for clip in clips) < _SILENT:
        has_sound = False
        notes.append(f"{path.name}: its sound is silent there, and is not searched for")
    present: list[Modality] = [*(["video"] if has_picture else []), *(["audio"] if has_sound else [])]  # type: ignore[list-item]
    if by is not None and by not in present:
        what = (
            "silent there" if by == "audio" and info.has_audio else f"without {'sound' if by == 'audio' else 'picture'}"
        )
        raise SearchError(f"query {path}: must have {by} to search by it, got a file that is {what}")
    if not present:
        raise SearchError(f"query {path}: must have a picture or a sound that can be heard, got silence")
    wanted = present if by is None else [by]
    return Query({(one, None): _mean(encoder, one, clips) for one in wanted}, len(clips), tuple(notes))


def query_of_text(encoder: MatchingEncoder, text: str) -> Query:
    """The embedding of a text, for each modality whose features it can be compared with.

    Raises
    ------
    SearchError
        The encoder has no text side.
    """
    modalities = text_modalities(encoder)
    if not modalities:
        raise SearchError(
            "search by text: the encoder of the index must have a text side, got none; towers such as "
            "hf:openai/clip-vit-base-patch32 have one (docs/zero-shot.md)"
        )
    return Query({("text", m): encode_text(encoder, [text], m)[0].float().cpu().numpy() for m in modalities})


def _starts(
    path: Path,
    info: MediaInfo,
    spec: ClipSpec,
    hop_seconds: float,
    at_seconds: float | None,
    window: tuple[float, float] | None,
) -> list[float]:
    duration = info.duration_seconds
    if at_seconds is not None:
        if not 0 <= at_seconds <= duration:
            raise SearchError(f"query {path}: --at must be in [0, {duration:.2f}], its length, got {at_seconds:g}")
        return [at_seconds - spec.length_seconds / 2]
    begin, end = window if window is not None else (0.0, duration)
    if not (0 <= begin < end <= duration + ROUNDING_SECONDS and begin < duration):
        raise SearchError(
            f"query {path}: --window must be two times in [0, {duration:.2f}], its length, got {begin:g} {end:g}"
        )
    slack = end - begin - spec.length_seconds
    if slack <= 0:
        return [begin + slack / 2]
    # As far apart as in the index, with whose runs of windows they are compared; so the end may be in none.
    starts = [begin + number * hop_seconds for number in range(math.floor(slack / hop_seconds + 1e-6) + 1)]
    middle = max(0, len(starts) - MOST_WINDOWS) // 2
    return starts[middle : middle + MOST_WINDOWS]


@torch.inference_mode()
def _mean(encoder: MatchingEncoder, modality: Modality, clips: list[Clip]) -> Float[np.ndarray, " dim"]:
    """Mean of the embeddings, of unit length."""
    rows: list[Tensor] = []
    for begin in range(0, len(clips), 16):
        some = clips[begin : begin + 16]
        frames, waveforms = (torch.stack(own) for own in ([c.frames for c in some], [c.waveform for c in some]))
        batch = ClipBatch(frames, waveforms, torch.arange(len(some)), torch.full((len(some),), -1), {})
        rows.append(match(encoder, modality, encode(encoder, modality, batch)))
    mean = torch.cat(rows).float().cpu().numpy().mean(axis=0, keepdims=True)
    return np.asarray(unit_rows(mean)[0], np.float32)
