"""What the file names of RAVDESS, CREMA-D and SAVEE say: emotion, speaker and performance.

Sources: Livingstone and Russo 2018, "The Ryerson Audio-Visual Database of Emotional Speech and Song (RAVDESS)"; Cao et
al. 2014, "CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset"; Haq and Jackson 2010, "Multimodal Emotion
Recognition" (SAVEE).
"""

import os
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from cmacc.clips.catalog.listing import normal
from cmacc.transfer.tasks import TaskError

EmotionSet = Literal["ravdess", "crema_d", "savee"]
"""Name of a data set."""
Channel = Literal["speech", "song"]
"""Of RAVDESS: spoken or sung."""

_RAVDESS = "MODALITY-CHANNEL-EMOTION-INTENSITY-STATEMENT-REPETITION-ACTOR such as 03-01-05-01-02-01-12"
_RAVDESS_FIELDS = (("modality", 3), ("channel", 2), ("emotion", 8), ("intensity", 2), ("statement", 2),
                   ("repetition", 2), ("actor", 24))  # fmt: skip
_RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_SUNG = 6  # the first six
_SILENT_FILM, _SOUND_ALONE = 2, 3
_CREMA_D = "ACTOR_SENTENCE_EMOTION_LEVEL such as 1001_DFA_ANG_XX"
_CREMA_D_SENTENCES = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
_CREMA_D_EMOTIONS = {
    "ANG": "angry", "DIS": "disgust", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad",
}  # fmt: skip
_CREMA_D_LEVELS = ("LO", "MD", "HI", "XX", "X")  # X: a slip for XX in some copies
_SAVEE = "SPEAKER_CODE such as DC_a01, or CODE in a folder of the speaker such as DC/a01"
_SAVEE_EMOTIONS = {
    "a": "angry", "d": "disgust", "f": "fearful", "h": "happy", "n": "neutral", "sa": "sad", "su": "surprised",
}  # fmt: skip
_SAVEE_SPEAKERS = ("DC", "JE", "JK", "KL")


class EmotionError(TaskError):
    """A file name that is not of the data set, or a choice that the data set does not have."""


class Performance(NamedTuple):
    """What a file name says.

    Attributes
    ----------
    key
        Equal for the versions of a performance, and for nothing else.
    emotion
        In words, the same for all three sets.
    speaker
        Name of the speaker, unique in the set.
    channel
        Spoken or sung.
    is_silent
        Whether the file is a film whose sound was taken away.
    is_sound_alone
        Whether the file was published as sound alone.
    """

    key: str
    emotion: str
    speaker: str
    channel: Channel = "speech"
    is_silent: bool = False
    is_sound_alone: bool = False


def performance_of(name_of_set: EmotionSet, file: str) -> Performance:
    """What the name of a file says.

    Parameters
    ----------
    name_of_set
        The data set.
    file
        Path of the file, with slashes; SAVEE has the speaker in the folder's name.

    Raises
    ------
    EmotionError
        The name is not of the set; the message tells the pattern, or the field and its values.

    Examples
    --------
    >>> performance_of("ravdess", "Actor_12/03-01-05-01-02-01-12.wav")[:3]
    ('01-05-01-02-01-12', 'angry', 'actor 12')
    >>> performance_of("savee", "AudioData/DC/sa07.wav")[:3]
    ('DC_sa07', 'sad', 'DC')
    """
    return _PARSERS[name_of_set](normal(file))


def _ravdess(file: str) -> Performance:
    stem = _stem(file)
    if re.fullmatch(r"\d\d(-\d\d){6}", stem, re.ASCII) is None:
        raise EmotionError(f"RAVDESS file {file}: name must be {_RAVDESS}, got {stem!r}")
    codes = [int(code) for code in stem.split("-")]
    for (field, count), code in zip(_RAVDESS_FIELDS, codes, strict=True):
        if not 1 <= code <= count:
            raise EmotionError(f"RAVDESS file {file}: {field} must be in [1, {count}], got {code}")
    modality, channel, emotion, intensity = codes[:4]
    if channel == 2 and emotion > _SUNG:
        raise EmotionError(f"RAVDESS file {file}: emotion of a song must be in [1, {_SUNG}], got {emotion}")
    if emotion == 1 and intensity == 2:
        raise EmotionError(f"RAVDESS file {file}: intensity of emotion 1, neutral, must be 1, got 2")
    return Performance(
        stem.partition("-")[2],
        _RAVDESS_EMOTIONS[emotion - 1],
        f"actor {codes[-1]:02d}",
        "song" if channel == 2 else "speech",
        modality == _SILENT_FILM,
        modality == _SOUND_ALONE,
    )


def _crema_d(file: str) -> Performance:
    stem = _stem(file)
    fields = stem.split("_")
    if len(fields) != 4:
        raise EmotionError(f"CREMA-D file {file}: name must be {_CREMA_D}, got {stem!r}")
    actor, sentence, emotion, level = fields
    if re.fullmatch(r"10\d\d", actor, re.ASCII) is None or not 1001 <= int(actor) <= 1091:
        raise EmotionError(f"CREMA-D file {file}: actor must be in [1001, 1091], got {actor!r}")
    for what, code, known in (
        ("sentence", sentence, _CREMA_D_SENTENCES),
        ("emotion", emotion, _CREMA_D_EMOTIONS),
        ("level", level, _CREMA_D_LEVELS),
    ):
        if code not in known:
            raise EmotionError(f"CREMA-D file {file}: {what} must be one of {', '.join(known)}, got {code!r}")
    key = f"{stem}X" if level == "X" else stem
    return Performance(key, _CREMA_D_EMOTIONS[emotion], f"actor {actor}")


def _savee(file: str) -> Performance:
    folder, _, _ = file.rpartition("/")
    stem = _stem(file)
    in_name = re.fullmatch(r"([A-Z]{2})_([a-z]{1,2})(\d\d)", stem, re.ASCII)
    in_folder = re.fullmatch(r"()([a-z]{1,2})(\d\d)", stem, re.ASCII)
    match = in_name or in_folder
    if match is None:
        raise EmotionError(f"SAVEE file {file}: name must be {_SAVEE}, got {stem!r}")
    speaker, code, number = match[1] or folder.rpartition("/")[2], match[2], int(match[3])
    if speaker not in _SAVEE_SPEAKERS:
        raise EmotionError(
            f"SAVEE file {file}: speaker must be one of {', '.join(_SAVEE_SPEAKERS)}, in the name or its folder, got "
            f"{speaker!r}"
        )
    if code not in _SAVEE_EMOTIONS:
        raise EmotionError(f"SAVEE file {file}: emotion must be one of {', '.join(_SAVEE_EMOTIONS)}, got {code!r}")
    most = 30 if code == "n" else 15
    if not 1 <= number <= most:
        raise EmotionError(f"SAVEE file {file}: number must be in [1, {most}] for {code}, got {number}")
    return Performance(f"{speaker}_{code}{number:02d}", _SAVEE_EMOTIONS[code], speaker)


_PARSERS: dict[EmotionSet, Callable[[str], Performance]] = {"ravdess": _ravdess, "crema_d": _crema_d, "savee": _savee}


def _stem(file: str) -> str:
    return os.path.splitext(file.rpartition("/")[2])[0]
