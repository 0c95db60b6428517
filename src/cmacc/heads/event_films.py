"""From the films of an AVE to items with the features of an encoder: `find_films`, then `embedded` for each encoder.

1. A film is found anywhere in the folder by its name without the extension, which is the video's id.
2. The films of listed rows are examined. They must have picture and sound, and be 10 s long within 0.5 s: the labels
   are of whole seconds. Others are refused, or skipped and listed.
3. An encoder sees ten windows spread evenly over a film. If its clip is 1 s long, these are the ten seconds exactly.
   With a longer clip, of L s, they overlap, and the centre of window t is up to (L - 1) / 2 s away from that of second
   t: most at both ends of the film, and inwards. So a long clip blurs where an event begins.
4. Features are standardised with the training rows, or the scale of an encoder's features would decide what a fixed
   learning rate makes of them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cmacc.clips import ListedFile, Listing, Manifest
from cmacc.clips.catalog.listing import VIDEO_SUFFIXES, FoundFile, find_media, normal
from cmacc.clips.progress import Progress, silent
from cmacc.heads.ave import SECONDS, read_ave
from cmacc.heads.event_items import EventSet, rows_in_use
from cmacc.heads.head import ItemsInMemory, feature_statistics
from cmacc.pretraining.clip_encoder import ClipEncoder, EncoderError, Modality
from cmacc.pretraining.features import embed
from cmacc.transfer.official import examined
from cmacc.transfer.tasks import TaskError

_MODALITIES: tuple[Modality, ...] = ("video", "audio")
_TOLERANCE_SECONDS = 0.5
_WAY_OUT = "--allow-partial (allow_partial=True) leaves them out, and the card states how many"


@dataclass(frozen=True, eq=False)
class Films:
    """The films of an AVE that can be used.

    Attributes
    ----------
    root
        Folder of annotations, lists and films.
    manifest
        The films.
    sample_of
        ``{video id: row of the manifest}``.
    skipped
        ``{file: reason}`` of films that cannot be used.
    allow_partial, drop_leaks
        As `find_films` was asked.
    """

    root: Path
    manifest: Manifest
    sample_of: Mapping[str, int]
    skipped: Mapping[str, str]
    allow_partial: bool
    drop_leaks: bool


def find_films(
    root: Path,
    *,
    allow_partial: bool = False,
    drop_leaks: bool = False,
    workers: int = 1,
    journal: Path | None = None,
    progress: Progress = silent,
) -> Films:
    """The films of the listed rows, examined. Of several films of one id, the first by path is taken.

    Parameters
    ----------
    root
        Folder of ``Annotations.txt`` and the lists, with the films anywhere in it.
    allow_partial
        Whether films, lists or rows may be missing.
    drop_leaks
        As in `read_ave`.
    workers
        Number of files examined at a time.
    journal
        Folder for the journal of the scan, so that later calls need not examine the files again.
    progress
        Called with (examined files, all files).

    Raises
    ------
    AveError
        Annotations or lists cannot be read, or rows have no film and ``allow_partial`` is not set.
    TaskError
        There is no film at all, or some cannot be used and ``allow_partial`` is not set.
    ListingError
        The folder is missing.
    """
    media = find_media("task ave", root)
    file_of: dict[str, FoundFile] = {}
    for file in media.files:  # sorted by path
        stem, ending = os.path.splitext(file.name)
        if ending.lower() in VIDEO_SUFFIXES:
            file_of.setdefault(normal(stem), file)
    if not file_of:
        raise TaskError(
            f"task ave: {root} must hold films named as their video ids, got none; with the published .h5 files "
            "instead, ENCODER must be `features`"
        )
    data = read_ave(root, allow_partial=allow_partial, drop_leaks=drop_leaks, available=file_of)
    wanted = sorted({data.video_ids[row] for rows in data.splits.values() for row in rows})
    if not wanted:
        raise TaskError(f"task ave: a film in {root} must be of a listed row, got {len(file_of):,} films of none")
    path_of = {name: media.path(file_of[name]) for name in wanted}
    files = tuple(ListedFile(path, media.root, None, None, name) for name, path in path_of.items())
    listing = Listing(files, (), 0, 0)
    scanned = examined(listing, f"task ave {root.resolve()}", workers=workers, journal=journal, progress=progress)
    faults = {str(path): reason for path, reason in scanned.skipped.items()} | _faults(scanned.manifest)
    _require_usable(root, faults, allow_partial)
    sample_of_path = {path: sample for sample, path in enumerate(scanned.manifest.column("path"))}
    return Films(
        root,
        scanned.manifest,
        {name: sample_of_path[str(path)] for name, path in path_of.items() if str(path) not in faults},
        faults,
        allow_partial,
        drop_leaks,
    )


def require_both(encoder: ClipEncoder) -> None:
    """Check that an encoder has both modalities.

    Raises
    ------
    EncoderError
        It lacks one.
    """
    if set(encoder.modalities) != set(_MODALITIES):
        got = f"{' and '.join(encoder.modalities)} alone" if encoder.modalities else "neither"
        raise EncoderError(f"task ave: encoder {type(encoder).__name__} must encode video and audio, got {got}")


def embedded(
    films: Films, encoder: ClipEncoder, *, workers: int = 0, cache: Path | None = None, progress: Progress = silent
) -> EventSet:
    """The rows of the films with the features of an encoder: (rows, 10, width) of each modality, standardised.

    The mean of a feature over all seconds of the training rows is then 0, and its standard deviation 1 (0 for a
    constant one).

    Parameters
    ----------
    films
        From `find_films`.
    encoder
        Of both modalities. Its windows are the seconds only if its clip is 1 s long; see the module.
    workers
        Number of decoding processes.
    cache
        Folder of cached features.
    progress
        Called with ("embed", windows done, total windows).

    Raises
    ------
    EncoderError
        The encoder lacks a modality, or its features are of a wrong shape or not finite.
    TaskError
        A film does not decode and `Films.allow_partial` is not set, or no training or test row remains.
    """
    require_both(encoder)
    wanted = sorted(films.sample_of.values())
    features = embed(
        encoder, films.manifest, wanted, _MODALITIES,
        windows=SECONDS, workers=workers, cache=cache, progress=progress,
    )  # fmt: skip
    paths = films.manifest.column("path")
    faults = {paths[sample]: reason for sample, reason in features.failures.items()}
    _require_usable(films.root, faults, films.allow_partial)
    place_of = {sample: place for place, sample in enumerate(features.sample_ids.tolist())}
    film_of = {name: place_of[sample] for name, sample in films.sample_of.items() if sample in place_of}
    data = read_ave(films.root, allow_partial=films.allow_partial, drop_leaks=films.drop_leaks, available=film_of)
    rows = rows_in_use(data)
    places = [film_of[data.video_ids[row]] for row in rows]
    columns = {str(m): torch.from_numpy(features.by_modality[m])[places] for m in _MODALITIES}
    train = torch.from_numpy(np.searchsorted(rows, data.splits["train"]))
    for name, column in columns.items():
        mean, scale = feature_statistics(column[train].flatten(0, 1))
        columns[name] = ((column - mean) / scale).float()
    labels = torch.from_numpy(data.labels[rows])
    return EventSet(data, rows, ItemsInMemory({**columns, "labels": labels}), range(0), {**films.skipped, **faults})


def _faults(manifest: Manifest) -> dict[str, str]:
    """Why a film cannot be used, by path."""
    found = {}
    columns = (manifest.column(name) for name in ("path", "width", "has_audio", "duration_seconds"))
    for path, width, has_audio, seconds in zip(*columns, strict=True):
        if not width or not has_audio:
            found[path] = f"has no {'sound' if width else 'picture'}"
        elif abs(seconds - SECONDS) > _TOLERANCE_SECONDS:
            found[path] = f"is {seconds:.1f} s long, not {SECONDS} s within {_TOLERANCE_SECONDS} s"
    return found


def _require_usable(root: Path, faults: Mapping[str, str], allow_partial: bool) -> None:
    if faults and not allow_partial:
        path, reason = next(iter(faults.items()))
        raise TaskError(
            f"task ave: every film of {root} must decode, have picture and sound, and be {SECONDS} s long, got "
            f"{len(faults)} that are not so, the first is {Path(path).name}: {reason}; {_WAY_OUT}"
        )
