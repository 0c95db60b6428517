"""Make an index of videos, or bring it up to date: what has changed alone.

1. The samples of the manifest (or folder) are compared with those of the table (`IDENTITY`).
2. Rows of samples that are gone or have changed are removed. Those whose content is known under another path are
   copied, so that a renamed file is not embedded again.
3. The others are embedded (`cmacc.search.embed`). Whole samples are committed about once a minute; after a kill, the
   next run embeds what was not committed.

On several machines, each embeds a part of the samples into files beside the table (``part``); the run without ``part``
that follows takes these files in.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cmacc.clips import Manifest, list_folders, scan, workers_of
from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import Store, written_aside
from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import ClipEncoder, MatchingEncoder
from cmacc.search.embed import (
    EmbeddedSamples,
    content_hash,
    embedded_elsewhere,
    embedded_here,
    is_content,
    sizes_of,
)
from cmacc.search.table import Description, SearchError, WindowTable, sql_text, table_schema
from cmacc.search.writer import WindowWriter, discard, part_names, writer_lock
from cmacc.transfer import open_encoder
from cmacc.transfer.open import OpenedEncoder, opened_object
from cmacc.transfer.text import text_modalities

# What tells a sample of the table from others, and whether it is up to date.
IDENTITY = ("path", "key", "label", "content_hash", "sample_start_seconds", "sample_end_seconds")
_Identity = tuple[str, str | None, str | None, str | None, float, float]
_Embed = Callable[[Sequence[int]], Iterator[EmbeddedSamples]]
_ROWS_PER_COMMIT = 20_000
_SECONDS_PER_COMMIT = 60.0
_HASHES_AT_ONCE = 200
_MOST_TRIES = 5
# In the metadata of files of parts: the kind of index that they were embedded for.
_KIND = b"cmacc.index"


@dataclass(frozen=True)
class EmbedResult:
    """What a run did.

    Attributes
    ----------
    added, copied, removed, kept
        Number of samples that were embedded; that were copied, because their content was known; that were removed; and
        that were left as they were.
    failures
        ``{path: reason}`` of files that did not decode, or that the scan skipped.
    seconds_embedded
        Length of the embedded samples.
    row_count
        Rows of the table; 0 for a part.
    disk_bytes
        Bytes of the index.
    description
        What the index is made of.
    """

    added: int
    copied: int
    removed: int
    kept: int
    failures: dict[str, str]
    seconds_embedded: float
    row_count: int
    disk_bytes: int
    description: Description


def embed_files(
    encoder: str | ClipEncoder,
    data: Path | Manifest,
    out: str | Path,
    *,
    root: str | Path | None = None,
    hop_seconds: float = 1.0,
    workers: int = 0,
    device: torch.device | None = None,
    part: tuple[int, int] = (1, 1),
    executor: Executor | None = None,
    rebuild: bool = False,
    download: bool = False,
    progress: Progress = silent,
) -> EmbedResult:
    """Make an index of videos, or bring it up to date.

    Parameters
    ----------
    encoder
        A name for `cmacc.transfer.open_encoder`, or your own `MatchingEncoder`.
    data
        Folder, manifest file or manifest. The index mirrors it: samples that are no longer there are removed.
    out
        Folder of the index, or the URL of an object store.
    root
        Folder or URL that paths are relative to. Default: the folder, or the one that holds all files of the manifest.
        For an index that exists, it states the new place of its files.
    hop_seconds
        From the start of a window to that of the next, at most the length of a window, which is the encoder's.
    workers
        Number of decoding processes; 0 decodes in this process, which a file that crashes its decoder then kills.
    device
        Device of the encoder. Default: the CPU. bf16 is used where it has units for it.
    part
        ``(i, n)``: embed only the i-th of n parts, counted from 1, into files beside the table.
    executor
        Embeds on its workers, in tasks of a few samples each; ``encoder`` must be a name that they can open.
    rebuild
        Replace an index, for example of another encoder: embed everything again.
    download
        Whether the encoder may be downloaded.
    progress
        Called with ("files", done, total) of a scan, and ("windows", done, total).

    Raises
    ------
    SearchError
        The encoder lacks a modality, the index has other weights or windows, a file lies outside of the root, the
        folder holds other files, or another process is writing.
    EncoderError, ManifestError, ListingError, ScanError
        The encoder or the data cannot be opened.
    """
    if rebuild and part[1] > 1:
        raise SearchError("embed: --rebuild replaces the index, and --part embeds a part of it; rebuild it as a whole")
    opened = _opened(encoder, device, download)
    with writer_lock(out, "writer" if part[1] == 1 else f"part-{part[0]}-of-{part[1]}"):
        store = Store(out)
        if (others := store.names()) and not Description.exists(store):
            raise SearchError(
                f"index {store.root}: --out must be an index or a new folder, got one with other files, such as "
                f"{others[0]}"
            )
        former = None if rebuild else Description.read(store)
        manifest, skipped, home = _manifest(data, store, workers, progress)
        if root is None:
            root = home if former is None else former.root
        description = _description(opened, hop_seconds, str(root))
        if former is not None:
            description = _agreed(former, description, store)
        embed: _Embed
        if executor is None:
            assert isinstance(opened.encoder, MatchingEncoder)
            embed = partial(embedded_here, opened.encoder, manifest, description, workers=workers, progress=progress)
        else:
            embed = partial(embedded_elsewhere, executor, manifest, description, progress=progress)
        wanted = _wanted(manifest, description)
        if rebuild:
            discard(out)
        if part[1] > 1:
            result = _embed_part(out, part, manifest, wanted, description, embed)
        else:
            result = _update(out, manifest, wanted, description, embed, progress)
        return replace(result, failures=skipped | result.failures)


def export_parquet(address: str | Path, file: Path) -> int:
    """Write all rows of an index as one Parquet file, which appears when it is complete; returns their number.

    Raises
    ------
    SearchError
        There is no index.
    """
    for left in reversed(range(_MOST_TRIES)):
        table, count = WindowTable(address), 0
        try:
            with written_aside(file) as aside, pq.ParquetWriter(aside, table_schema(table.description)) as parquet:
                for batch in table.batches():
                    parquet.write_batch(batch)
                    count += len(batch)
            return count
        except RuntimeError:  # a writer has deleted the files of this version
            if left == 0:
                raise
    raise AssertionError("unreachable")


# ---- what is wanted -------------------------------------------------------------------------------------------------


def _opened(encoder: str | ClipEncoder, device: torch.device | None, download: bool) -> OpenedEncoder:
    opened = open_encoder(encoder, device, download=download) if isinstance(encoder, str) else opened_object(encoder)
    if not isinstance(opened.encoder, MatchingEncoder) or set(opened.encoder.modalities) != set(MODALITIES):
        raise SearchError(
            f"embed: encoder {opened.facts.name} must encode video and audio into one space, as those of cmacc "
            f"pretrain do, got one of {' and '.join(opened.encoder.modalities)} without such a space"
        )
    if Path(opened.facts.name).is_dir():  # the index may be opened from another folder
        opened = replace(opened, facts=replace(opened.facts, name=str(Path(opened.facts.name).resolve())))
    return opened


def _manifest(
    data: Path | Manifest, store: Store, workers: int, progress: Progress
) -> tuple[Manifest, dict[str, str], str]:
    """The manifest; what a scan skipped, and why; and the default root."""
    if isinstance(data, Path) and data.is_dir():
        journal = Path(store.root) / ".scan" if "://" not in store.root else None
        with workers_of(max(1, workers)) as executor:
            scanned = scan(list_folders([data]), executor=executor, journal=journal, progress=progress)
        skipped = {str(path): reason for path, reason in scanned.skipped.items()}
        return scanned.manifest, skipped, str(data.resolve())
    manifest = data if isinstance(data, Manifest) else Manifest.read(data)
    paths = manifest.column("path")
    if not paths:
        raise SearchError("embed: the manifest must name at least one file, got none")
    # Not commonpath, which makes one slash of the two of a URL.
    common = os.path.commonprefix([f"{os.path.dirname(path)}/" for path in paths])  # noqa: RUF071
    return manifest, {}, common.rpartition("/")[0] or "/"


def _description(opened: OpenedEncoder, hop_seconds: float, root: str) -> Description:
    encoder = opened.encoder
    assert isinstance(encoder, MatchingEncoder)
    length = encoder.spec.length_seconds
    if not 0 < hop_seconds <= length:
        raise SearchError(f"embed: --hop must be in (0, {length:g}], the length of a window, got {hop_seconds:g}")
    sizes = sizes_of(encoder)
    text_sizes = {modality: sizes[modality][0] for modality in text_modalities(encoder)}
    if "://" not in root:
        root = str(Path(root).resolve())
    return Description(
        opened.facts.name,
        opened.facts.weights,
        root,
        length,
        hop_seconds,
        sizes["video"][1],
        text_sizes,
        made=uuid.uuid4().hex,
    )


def _agreed(former: Description, asked: Description, store: Store) -> Description:
    """The former description, with the root and the name of the encoder as they are now."""
    for name, what in (
        ("weights", "the weights of the encoder"),
        ("window_seconds", "the length of windows"),
        ("hop_seconds", "--hop"),
        ("size", "the size of embeddings"),
        ("text_sizes", "the features for text"),
    ):
        if getattr(former, name) != getattr(asked, name):
            raise SearchError(
                f"index {store.root}: {what} must be {getattr(former, name)}, as for the rows that it has, got "
                f"{getattr(asked, name)}; choose another --out, or give --rebuild to embed everything again"
            )
    return replace(former, root=asked.root, encoder=asked.encoder)


def _wanted(manifest: Manifest, description: Description) -> dict[_Identity, int]:
    """The sample ids of a manifest by identity. A sample that is listed twice counts once."""
    wanted: dict[_Identity, int] = {}
    for sample_id, record in enumerate(manifest.records):
        path, end_seconds = description.relative(str(record.path)), record.start_seconds + record.duration_seconds
        identity = (path, record.key, record.label, content_hash(record), record.start_seconds, end_seconds)
        wanted.setdefault(identity, sample_id)
    return wanted


# ---- bringing the table up to date ----------------------------------------------------------------------------------


def _update(
    out: str | Path,
    manifest: Manifest,
    wanted: Mapping[_Identity, int],
    description: Description,
    embed: _Embed,
    progress: Progress,
) -> EmbedResult:
    writer, store = WindowWriter(out, description), Store(out)
    present = _identities(writer.columns(*IDENTITY))
    stale = {identity[0] for identity in present if identity not in wanted}  # all samples of a path go together
    missing = {one: i for one, i in wanted.items() if one not in present or one[0] in stale}
    removed = sum(identity[0] in stale for identity in present)
    copies = _copies(writer, missing)
    writer.remove(sorted(stale))
    copied = _add_all(writer, copies)
    of_parts: set[_Identity] = set()
    for name, rows in _parts(store, description):
        of_parts |= _add_all(writer, [_of_samples(rows, missing.keys() - copied - of_parts)])
        store.delete(name)
    todo = [i for identity, i in missing.items() if identity not in copied | of_parts]
    done, failures = _commit_all(embed(todo), writer.add)
    done += [missing[identity] for identity in of_parts]
    description = writer.finish(progress)
    return EmbedResult(
        added=len(done),
        copied=len(copied),
        removed=removed,
        kept=len(present) - removed,
        **_of_manifest(manifest, done, failures),
        row_count=len(writer),
        disk_bytes=store.size_bytes(),
        description=description,
    )


def _copies(writer: WindowWriter, missing: Mapping[_Identity, int]) -> list[pa.Table]:
    """Rows of missing samples whose content is known under another path, key or label. They are held in memory."""
    by_content: dict[tuple[str, float, float], list[_Identity]] = {}
    for identity in missing:
        if (content := _content(identity)) is not None:
            by_content.setdefault(content, []).append(identity)
    hashes = sorted({content[0] for content in by_content})
    copies = []
    for begin in range(0, len(hashes), _HASHES_AT_ONCE):
        listed = ", ".join(map(sql_text, hashes[begin : begin + _HASHES_AT_ONCE]))
        rows = writer.rows_where(f"content_hash IN ({listed})")
        for known, places in _places(rows).items():
            content = _content(known)
            for identity in by_content.pop(content, ()) if content is not None else ():  # of several copies, the first
                one = rows.take(pa.array(places))
                for name, value in zip(IDENTITY[:3], identity[:3], strict=True):
                    column = pa.array([value] * len(one), pa.string())
                    one = one.set_column(one.column_names.index(name), name, column)
                copies.append(one)
    return copies


def _content(identity: _Identity) -> tuple[str, float, float] | None:
    """The part of an identity that does not change when a file is renamed; None if the content is not known."""
    return (identity[3], identity[4], identity[5]) if identity[3] is not None and is_content(identity[3]) else None


def _add_all(writer: WindowWriter, tables: list[pa.Table]) -> set[_Identity]:
    """Add them in one commit; returns the identities of their samples."""
    rows = pa.concat_tables(tables) if tables else []
    if len(rows) == 0:
        return set()
    writer.add(rows)
    return _identities(rows)


def _parts(store: Store, description: Description) -> Iterator[tuple[str, pa.Table]]:
    """The files of all parts: name and rows."""
    for name in part_names(store):
        rows = pq.read_table(pa.BufferReader(store.read(name)))
        if (rows.schema.metadata or {}).get(_KIND, b"").decode() != description.kind:
            raise SearchError(
                f"index {store.root}: {name} was embedded by another encoder or with other windows; delete it, and "
                "embed that part again"
            )
        yield name, rows.replace_schema_metadata(None)


def _embed_part(
    out: str | Path,
    part: tuple[int, int],
    manifest: Manifest,
    wanted: Mapping[_Identity, int],
    description: Description,
    embed: _Embed,
) -> EmbedResult:
    store = Store(out)
    if Description.read(store) is None:
        description.write(store)
    known: set[_Identity] = set()
    with suppress(SearchError):  # there may be no table yet
        known |= _identities(WindowTable(out).columns(*IDENTITY))
    for _, rows in _parts(store, description):
        known |= _identities(rows)
    own = list(wanted.items())[part[0] - 1 :: part[1]]
    own_files = f"part-{part[0]}-of-{part[1]}-"
    numbers = [int(name[len(own_files) : -len(".parquet")]) for name in part_names(store) if name.startswith(own_files)]
    count = max(numbers, default=0)

    def add(rows: pa.Table) -> None:
        nonlocal count
        count += 1
        with store.new(f"{own_files}{count:06}.parquet") as aside:
            pq.write_table(rows.replace_schema_metadata({_KIND: description.kind}), aside)

    done, failures = _commit_all(embed([i for identity, i in own if identity not in known]), add)
    return EmbedResult(
        added=len(done),
        copied=0,
        removed=0,
        kept=len(own) - len(done) - len(failures),
        **_of_manifest(manifest, done, failures),
        row_count=0,
        disk_bytes=store.size_bytes(),
        description=description,
    )


def _commit_all(
    embedded: Iterable[EmbeddedSamples], add: Callable[[pa.Table], None]
) -> tuple[list[int], dict[int, str]]:
    """Add samples as they come, many in a commit; returns the ids of those done, and why others failed."""
    done: list[int] = []
    failures: dict[int, str] = {}
    waiting: list[pa.Table] = []
    since = time.monotonic()

    def commit() -> None:
        nonlocal since
        if sum(map(len, waiting)):
            add(pa.concat_tables(waiting))
        waiting.clear()
        since = time.monotonic()

    try:
        for some in embedded:
            waiting.append(some.rows)
            done += some.sample_ids
            failures |= some.failures
            if sum(map(len, waiting)) >= _ROWS_PER_COMMIT or time.monotonic() - since >= _SECONDS_PER_COMMIT:
                commit()
    except BaseException:  # what is done is kept
        with suppress(Exception):
            commit()
        raise
    commit()
    return done, failures


def _of_manifest(manifest: Manifest, done: Sequence[int], failures: Mapping[int, str]) -> dict[str, Any]:
    """``failures`` and ``seconds_embedded`` of the result."""
    paths, seconds = manifest.column("path"), manifest.column("duration_seconds")
    return {
        "failures": {paths[i]: reason for i, reason in failures.items()},
        "seconds_embedded": math.fsum(seconds[i] for i in done),
    }


def _identities(rows: pa.Table) -> set[_Identity]:
    """The samples of rows."""
    samples = rows.select(IDENTITY).group_by(list(IDENTITY)).aggregate([])
    return set(zip(*(samples.column(name).to_pylist() for name in IDENTITY), strict=True))


def _places(rows: pa.Table) -> dict[_Identity, list[int]]:
    """The samples of rows, and where the rows of each are."""
    places: dict[_Identity, list[int]] = {}
    for place, identity in enumerate(zip(*(rows.column(name).to_pylist() for name in IDENTITY), strict=True)):
        places.setdefault(identity, []).append(place)
    return places


def _of_samples(rows: pa.Table, identities: Collection[_Identity]) -> pa.Table:
    """The rows of these samples."""
    own = [place for identity, places in _places(rows).items() if identity in identities for place in places]
    return rows.take(pa.array(own, pa.int64()))
