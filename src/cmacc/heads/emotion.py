"""Emotion from speech: RAVDESS, CREMA-D and SAVEE by their file names, in folds that share no speaker.

1. A file name tells the emotion, the speaker and the performance: who says which sentence how, and which take. The
   same performance is there in several versions (RAVDESS: film with sound, film without, sound; CREMA-D: film, MP3,
   WAV). One version of each is used, of one kind for the whole set, so that no codec tells speakers or classes apart.
2. Speakers are the groups of the files. Folds hold out whole speakers (`StratifiedGroupKFold` over speakers), because
   a voice that was trained on is recognised with its emotions.
3. An incomplete copy is refused, or its share is stated.

The probes of `cmacc.transfer` then measure accuracy and unweighted average recall (UAR).

The folds are ours: none of the three sets has official ones. Sources: `cmacc.heads.emotion_names`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cmacc.clips import ListedFile, Listing
from cmacc.clips.catalog.listing import (
    AUDIO_SUFFIXES,
    VIDEO_SUFFIXES,
    FoundFile,
    by_ending,
    find_media,
    require_media,
)
from cmacc.clips.progress import Progress, silent
from cmacc.heads.emotion_names import Channel, EmotionError, EmotionSet, Performance, performance_of
from cmacc.heads.listed import ScanOptions, WholeSet, listed_task
from cmacc.pretraining.clip_encoder import Modality
from cmacc.transfer.tasks import TaskData, grouped_folds

Version = Literal["audio", "audio_visual"]
"""Which files of a performance: sound alone, or film with sound."""
_LOSSLESS = (".wav", ".flac", ".aif", ".aiff")
_FOLDS: dict[EmotionSet, int] = {"ravdess": 6, "crema_d": 5, "savee": 4}  # 4, 18 or 19, and 1 speaker held out
_WHOLE: dict[tuple[EmotionSet, frozenset[Channel]], WholeSet] = {
    ("ravdess", frozenset({"speech"})): WholeSet(1_440, 8, 24),
    ("ravdess", frozenset({"song"})): WholeSet(1_012, 6, 23),  # actor 18 did not sing
    ("ravdess", frozenset({"speech", "song"})): WholeSet(2_452, 8, 24),
    ("crema_d", frozenset({"speech"})): WholeSet(7_442, 6, 91),
    ("savee", frozenset({"speech"})): WholeSet(480, 7, 4),
}


@dataclass(frozen=True)
class EmotionChoice:
    """Which files of a data set are used.

    Attributes
    ----------
    version
        Sound alone, or film with sound; of each performance one file.
    channels
        Spoken, sung or both; only RAVDESS has songs.
    """

    version: Version = "audio"
    channels: frozenset[Channel] = frozenset({"speech"})

    def __post_init__(self) -> None:
        if self.version not in get_args(Version):
            raise EmotionError(
                f"EmotionChoice: version must be one of {', '.join(get_args(Version))}, got {self.version!r}"
            )
        if not self.channels or not self.channels <= set(get_args(Channel)):
            got = ", ".join(map(repr, sorted(self.channels))) or "none"
            raise EmotionError(f"EmotionChoice: channels must be speech, song or both, got {got}")


def list_emotion(name_of_set: EmotionSet, root: Path | str, choice: EmotionChoice) -> tuple[Listing, dict[str, str]]:
    """The chosen file of every performance under a folder, and the files whose names are not of the set.

    Of several files of one kind and performance, the one published as sound is preferred, then the one without loss,
    then a file to a link, then the first by path.

    Parameters
    ----------
    name_of_set
        The data set.
    root
        Folder of its files, in any layout.
    choice
        Which files are used.

    Returns
    -------
    The listing, with emotions as labels and speakers as groups; and ``{file: reason}``.

    Raises
    ------
    EmotionError
        The set has no songs but they were chosen, or no file is of the set and the chosen kind.
    ListingError
        The folder is missing or holds no media file.
    """
    owner = f"task emotion, {name_of_set}"
    if (name_of_set, choice.channels) not in _WHOLE:
        raise EmotionError(f"{owner}: channels must be speech, since only ravdess has songs, got {_words(choice)}")
    media = find_media("list_emotion", root)
    require_media("list_emotion", [media])
    suffixes = AUDIO_SUFFIXES if choice.version == "audio" else VIDEO_SUFFIXES
    chosen: dict[str, tuple[tuple[bool, bool, bool], FoundFile, Performance]] = {}
    others: dict[str, str] = {}
    for file in media.files:  # sorted by path
        try:
            performance = performance_of(name_of_set, file.relative)
        except EmotionError as error:
            others[str(media.path(file))] = str(error)
            continue
        ending = os.path.splitext(file.name)[1].lower()
        if ending not in suffixes or performance.is_silent or performance.channel not in choice.channels:
            continue
        rank = (not performance.is_sound_alone, ending not in _LOSSLESS, file.is_link)
        if performance.key not in chosen or rank < chosen[performance.key][0]:
            chosen[performance.key] = (rank, file, performance)
    if not chosen:
        cause = next(iter(others.values()), "EmotionChoice takes the other version or channel")
        raise EmotionError(
            f"{owner}: {root} must hold {choice.version} files of {_words(choice)}, got none among "
            f"{len(media.files):,} media files; {cause}"
        )
    files = [
        ListedFile(media.path(file), media.root, performance.emotion, None, performance.speaker)
        for _, file, performance in chosen.values()
    ]
    files.sort(key=lambda file: str(file.path).split("/"))
    others |= {str(path): reason for path, reason in media.skipped}
    listing = Listing(tuple(files), (), 0, 0, skipped=tuple(media.skipped), other_endings=by_ending([media]))
    return listing, others


def emotion_task(
    name_of_set: EmotionSet,
    root: Path,
    *,
    choice: EmotionChoice | None = None,
    folds: int | None = None,
    seed: int = 0,
    allow_partial: bool = False,
    workers: int = 1,
    journal: Path | None = None,
    progress: Progress = silent,
) -> TaskData:
    """Emotions of a data set on disk, in folds that hold out whole speakers.

    Parameters
    ----------
    name_of_set
        ``ravdess``, ``crema_d`` or ``savee``.
    root
        Folder of its files, in any layout.
    choice
        Which files are used. Default: of RAVDESS, the spoken performances; of each performance, the sound.
    folds
        Number of folds. Default: 6 of RAVDESS, 5 of CREMA-D, 4 of SAVEE, or one for each speaker if there are fewer.
    seed
        Seed of the folds.
    allow_partial
        Whether files, emotions or speakers may be missing.
    workers
        Number of files examined at a time.
    journal
        Folder for the journal of the scan, so that later calls need not examine the files again.
    progress
        Called with (examined files, all files).

    Returns
    -------
    The data, with a speaker's files as a group, in splits that share no speaker.

    Raises
    ------
    EmotionError
        The data set is unknown, has no such files, or fewer than two speakers.
    TaskError
        Something is missing and ``allow_partial`` is not set, or there are fewer speakers than folds.
    ListingError
        The folder is missing or holds no media file.
    """
    if name_of_set not in get_args(EmotionSet):
        raise EmotionError(
            f"task emotion: data set must be one of {', '.join(get_args(EmotionSet))}, got {name_of_set!r}"
        )
    choice = choice or EmotionChoice()
    listing, others = list_emotion(name_of_set, root, choice)
    speakers = len({file.group for file in listing.files})
    if speakers < 2:
        raise EmotionError(f"task emotion, {name_of_set}: {root} must hold at least 2 speakers, got {speakers}")
    count = min(_FOLDS[name_of_set], speakers) if folds is None else folds
    modalities: tuple[Modality, ...] = ("audio",) if choice.version == "audio" else ("video", "audio")
    return listed_task(
        "emotion",
        name_of_set,
        root,
        listing,
        modalities,
        _WHOLE[name_of_set, choice.channels],
        lambda manifest, class_of: grouped_folds("emotion", manifest, class_of, count, seed),
        allow_partial=allow_partial,
        left_out=others,
        options=ScanOptions(workers, journal, progress),
    )


def _words(choice: EmotionChoice) -> str:
    return " and ".join(sorted(choice.channels))
