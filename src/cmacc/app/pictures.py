"""Pictures of a part of a file: a strip of frames, a spectrogram, and the frames with the place of the sound."""

import tempfile
from pathlib import Path

import numpy as np
from torch.nn import functional

from cmacc.clips import ClipSpec, LogMel, MediaError, PackedSample, decode_clip
from cmacc.pretraining.clip_encoder import EncoderError, MatchingEncoder, SpatialEncoder
from cmacc.search import localise, write_strip
from cmacc.viewer.drawing import DRAWING
from cmacc.viewer.figures import picture_file, spectrogram_pixels
from cmacc.viewer.gallery import shown_range

FRAMES = 4
FRAME_HEIGHT, FRAME_WIDTH = 120, 160
SPECTROGRAM_HEIGHT, SPECTROGRAM_WIDTH = 128, 640
_SOUND_RATE_HZ = 16_000


def frame_strip(source: Path | PackedSample, start_seconds: float, end_seconds: float, count: int = FRAMES) -> bytes:
    """JPEG: frames in a row, spread evenly over the part, scaled to 160 x 120 and cropped around the middle.

    Raises
    ------
    MediaError
        It does not decode.
    """
    length = end_seconds - start_seconds
    spec = ClipSpec(
        frame_count=count,
        frame_rate_hz=count / length,
        frame_height=FRAME_HEIGHT,
        frame_width=FRAME_WIDTH,
        audio_seconds=length,
        sample_rate_hz=1_000,  # nobody hears it
    )
    frames = decode_clip(source, start_seconds, spec).frames.numpy()
    return picture_file(np.concatenate(list(frames), axis=1), "jpeg", pil_kwargs={"quality": 80})


def spectrogram(source: Path | PackedSample, start_seconds: float, end_seconds: float) -> bytes:
    """PNG, 640 x 128: time to the right, pitch upwards, brighter is louder.

    Raises
    ------
    MediaError
        It does not decode.
    """
    length = end_seconds - start_seconds
    spec = ClipSpec(
        frame_count=1,
        frame_rate_hz=1 / length,
        frame_height=8,
        frame_width=8,
        audio_seconds=length,
        sample_rate_hz=_SOUND_RATE_HZ,
    )
    waveform = decode_clip(source, start_seconds, spec).waveform
    log_mel = LogMel(_SOUND_RATE_HZ, SPECTROGRAM_HEIGHT // 2)(waveform[None])
    # The loudest of the columns that share a pixel: a knock of a long part stays visible.
    if log_mel.shape[2] > SPECTROGRAM_WIDTH:
        log_mel = functional.adaptive_max_pool1d(log_mel, SPECTROGRAM_WIDTH)
    levels = log_mel[0].numpy()
    return picture_file(spectrogram_pixels(levels, *shown_range(levels)), "png")


def sound_in_picture(
    source: Path | PackedSample, start_seconds: float, end_seconds: float, encoder: MatchingEncoder
) -> bytes:
    """PNG: four frames of the part's best moment, coloured where the sound comes from, and the agreement over time.

    Raises
    ------
    EncoderError
        The encoder has no feature map.
    MediaError
        The file is packed, does not decode, or lacks sound or picture.
    """
    if not isinstance(encoder, SpatialEncoder):
        raise EncoderError("the encoder of this index gives no map of the picture, so that no place can be shown")
    if isinstance(source, PackedSample):
        raise MediaError("where the sound is can be shown for separate files only, got a packed sample")
    found = localise(source, encoder, begin_seconds=start_seconds, end_seconds=end_seconds)
    with DRAWING, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heat.png"
        write_strip(found, path, top=1)
        return path.read_bytes()
