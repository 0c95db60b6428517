"""What a file is to a browser: which of them play it as it is, and whether it has picture and sound.

The container and the codecs count, not the name. Other files are played in parts that are re-encoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from cmacc.clips import MediaError, PackedSample
from cmacc.clips.media.container import Medium, is_cover_image, stream_start_seconds

# Container (FFmpeg's name): media type of films and of sounds, and the codecs that browsers decode in it.
_PLAYED = {
    "mov,mp4,m4a,3gp,3g2,mj2": ("video/mp4", "audio/mp4", {"h264", "av1", "vp9"}, {"aac", "mp3", "opus"}),
    "matroska,webm": ("video/webm", "audio/webm", {"vp8", "vp9", "av1"}, {"vorbis", "opus"}),
    "ogg": ("video/ogg", "audio/ogg", set[str](), {"vorbis", "opus", "flac"}),
    "wav": ("", "audio/wav", set[str](), {"pcm_s16le", "pcm_u8", "pcm_s24le", "pcm_f32le"}),
    "mp3": ("", "audio/mpeg", set[str](), {"mp3"}),
    "flac": ("", "audio/flac", set[str](), {"flac"}),
}
_PICTURES = {"png_pipe": "image/png", "jpeg_pipe": "image/jpeg", "webp_pipe": "image/webp"}
# Browsers and cmacc count seconds from different places if the first picture is not at 0. MP3 begins a little later.
_SAME_START_SECONDS = 0.05
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")


@dataclass(frozen=True)
class Look:
    """What a file is.

    Attributes
    ----------
    has_picture, has_sound
        Which streams it has.
    media_type
        Media type, if browsers play the file as it is; otherwise None.
    """

    has_picture: bool
    has_sound: bool
    media_type: str | None


def look_at(source: Path | PackedSample) -> Look:
    """Look into a file, without decoding it. Packed samples are never played as they are: they lie in a shard.

    Raises
    ------
    MediaError
        It cannot be opened.
    """
    if isinstance(source, PackedSample):
        return Look(source.video is not None, source.audio is not None, None)
    with Medium.file(source).open() as container:
        kind = container.format.name
        films = [stream for stream in container.streams.video if not is_cover_image(stream)]
        sounds = list(container.streams.audio)
        if kind in _PICTURES or kind == "image2":
            codec = films[0].codec_context.name if films else ""
            return Look(True, False, _PICTURES.get(kind) or {"png": "image/png", "mjpeg": "image/jpeg"}.get(codec))
        return Look(bool(films), bool(sounds), _media_type(kind, films, sounds))


def _media_type(kind: str, films: Sequence[VideoStream], sounds: Sequence[AudioStream]) -> str | None:
    if kind not in _PLAYED or len(films) > 1 or len(sounds) > 1 or not (films or sounds):
        return None  # of several streams, a browser may choose another than cmacc did
    if any(abs(stream_start_seconds(stream)) > _SAME_START_SECONDS for stream in (films or sounds)):
        return None
    of_films, of_sounds, film_codecs, sound_codecs = _PLAYED[kind]
    # Despite PyAV's type annotations, the context is None if FFmpeg does not know the codec.
    if any(stream.codec_context is None for stream in (*films, *sounds)):
        return None
    fits = (
        all(s.codec_context.codec.canonical_name in film_codecs for s in films)
        and all(s.codec_context.pix_fmt in _PIXEL_FORMATS for s in films)
        and all(s.codec_context.codec.canonical_name in sound_codecs for s in sounds)
    )
    return (of_films if films else of_sounds) if fits else None
