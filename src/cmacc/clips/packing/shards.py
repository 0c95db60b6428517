"""Pack a manifest into shards: plain tar files with WebDataset names, and an index for random access.

``DIR`` holds ``pack.json`` (the settings), ``shard-000000.tar``..., and at the end ``index.parquet``, which is a
manifest of the packed samples. A shard is the unit of work. It appears complete or not at all, and only depends on its
own rows, so an interrupted pack resumes with the missing shards and ends with the same bytes. The index is always built
by reading the shards back, hashes included, also right after they were written.
"""

import dataclasses
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cmacc.clips.catalog.manifest import SCHEMA, Manifest, MediaRecord
from cmacc.clips.media.decoding import MediaInfo, probe
from cmacc.clips.media.guard import GuardError, guarded
from cmacc.clips.packing.transcode import PackSettings, transcode
from cmacc.clips.parallel import results_of, workers_of
from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import Store

INDEX = "index.parquet"
_NOTE = "pack.json"
_THREADS = 2
_ENDINGS = ("mp4", "flac", "json")
_INDEX_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("source", pa.string()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        *((f"{ending}_sha256", pa.string()) for ending in _ENDINGS),
    ]
)


class PackError(ValueError):
    """A pack that cannot be created or used; the message says why."""


@dataclass(frozen=True)
class PackResult:
    """Result of packing: numbers of samples and shards in the index, and ``{path: reason}`` of skipped files."""

    sample_count: int
    shard_count: int
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Shard:
    """One task: rows of the manifest, from ``first`` on, to write as one file."""

    number: int
    first: int
    records: tuple[MediaRecord, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"

    @property
    def skipped_name(self) -> str:  # the extension is kept for compatibility with earlier packs
        return f"shard-{self.number:06d}.refused.json"


def pack(
    manifest: Manifest,
    out: str | Path,
    settings: PackSettings | None = None,
    *,
    part: tuple[int, int] = (1, 1),
    executor: Executor | None = None,
    timeout_seconds: float = 600.0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> PackResult:
    """Transcode a manifest's samples into shards, or resume an interrupted pack.

    Parameters
    ----------
    manifest
        Files, or segments of files; not samples that are already packed.
    out
        Folder, or a URL that fsspec opens.
    settings
        Sizes and rates. Default: `PackSettings`.
    part
        ``(i, n)``: pack only the i-th of n parts of the shards, counted from 1, without an index; for batch schedulers.
        A later call without ``part`` finds these shards and writes the index.
    executor
        Runs the tasks. Default: two local threads.
    timeout_seconds
        Time after which a sample is skipped.
    overwrite
        Replace the pack in ``out``. Otherwise complete shards are kept, including their skipped samples.
    progress
        Called with (finished shards, all shards).

    Raises
    ------
    PackError
        ``out`` holds another pack, the manifest is empty or holds packed samples, files of it are missing, or no sample
        could be packed.
    """
    settings = settings if settings is not None else PackSettings()
    if not len(manifest):
        raise PackError("pack: the manifest must hold at least one sample, got none")
    if any(size is not None for name in ("video_size", "audio_size") for size in manifest.column(name)):
        raise PackError("pack: the manifest must be of files, got samples that are packed already")
    gone = [path for path in dict.fromkeys(manifest.column("path")) if not Path(path).exists()]
    if gone:  # otherwise an unmounted disk would give shards that skip everything
        raise PackError(f"pack: all files of the manifest must be there, got {len(gone)} missing, such as {gone[0]}")
    store = Store(out)
    _begin(store, manifest, settings, overwrite)
    shards = list(_shards(manifest, settings.samples_per_shard, part))
    found: dict[int, tuple[list[dict[str, Any]], dict[str, str]]] = {}
    task = partial(_pack_shard, root=store.root, settings=settings, timeout_seconds=timeout_seconds)
    with nullcontext(executor) if executor is not None else workers_of(_THREADS) as workers:
        for shard, packed in results_of(workers, task, shards):
            found[shard.number] = packed
            progress("shards", len(found), len(shards))
    rows = [row for number in sorted(found) for row in found[number][0]]
    skipped = {path: reason for number in sorted(found) for path, reason in found[number][1].items()}
    if not rows and shards:
        raise PackError(f"pack: at least one sample must be readable, got none: {next(iter(skipped.items()))}")
    if part[1] == 1:
        with store.new(INDEX) as aside:
            pq.write_table(pa.Table.from_pylist(rows, schema=_INDEX_SCHEMA), aside)
    return PackResult(len(rows), len(shards), skipped)


def verify(out: str | Path, progress: Progress = silent) -> list[str]:
    """Compare every shard, byte for byte by its hashes, with the index.

    Returns
    -------
    list of str
        What is wrong, a sentence each; empty if all is well.

    Raises
    ------
    PackError
        ``out`` holds no index.
    """
    store = Store(out)
    indexed: dict[str, list[dict[str, Any]]] = {}
    for row in _read_index(store).to_pylist():
        indexed.setdefault(row["path"].rsplit("/", 1)[-1], []).append(row)
    present = {name for name in store.names() if name.startswith("shard-") and name.endswith(".tar")}
    problems = [f"{name}: the index names it, but it is not there" for name in sorted(set(indexed) - present)]
    for done, name in enumerate(sorted(present), start=1):
        try:
            rows = {row["key"]: row for row in _shard_rows(store, name)}
        except PackError as error:
            problems.append(str(error))
            continue
        for row in indexed.get(name, []):
            if rows.pop(row["key"], None) != row:
                problems.append(f"{name}: sample {row['key']} is not what the index says")
        problems += [f"{name}: sample {key} is not in the index" for key in rows]
        progress("shards", done, len(present))
    return problems


def _begin(store: Store, manifest: Manifest, settings: PackSettings, overwrite: bool) -> None:
    """Write what is asked for, or make sure that the pack that is there was asked for the same."""
    wanted = {"format": 1, "manifest": _digest(manifest), "samples": len(manifest), **dataclasses.asdict(settings)}
    names = store.names()
    if _NOTE in names:
        found = json.loads(store.read(_NOTE))
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if not differing and not overwrite:
            return
        if not overwrite:
            told = ", ".join(f"{name} ({found.get(name)}, not {wanted[name]})" for name in differing)
            raise PackError(
                f"pack {store.root}: must be empty or hold the same pack, got one with another {told}; choose another "
                "folder, or pass --overwrite to replace it"
            )
        for name in (*(n for n in names if n == INDEX or n.startswith("shard-")), _NOTE):
            store.delete(name)  # the note last: if this is interrupted, the folder is still known for a pack
    elif names:
        raise PackError(f"pack {store.root}: must be empty or hold a pack, got other files, such as {names[0]}")
    store.write(_NOTE, (json.dumps(wanted, indent=2) + "\n").encode())


def _digest(manifest: Manifest) -> str:
    """Of all that shapes a shard's bytes."""
    digest = hashlib.sha256()
    names = ("content_hash", "start_seconds", "duration_seconds", "label", "split", "group", "findings", "path")
    for *facts, path in zip(*map(manifest.column, names), strict=True):
        digest.update(json.dumps([*facts, Path(path).name]).encode())
    return digest.hexdigest()


def _shards(manifest: Manifest, samples_per_shard: int, part: tuple[int, int]) -> Iterator[_Shard]:
    firsts = list(enumerate(range(0, len(manifest), samples_per_shard)))
    for number, first in firsts[part[0] - 1 :: part[1]]:
        yield _Shard(number, first, tuple(manifest.records[first : first + samples_per_shard]))


def _pack_shard(
    shard: _Shard, root: str, settings: PackSettings, timeout_seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write a shard unless it is there; its rows of the index, and ``{path: reason}`` of what is not in it."""
    store = Store(root)
    found = _finished(store, shard) if store.exists(shard.name) else None
    if found is None:
        skipped: dict[str, str] = {}
        with store.new(shard.name) as tar, tempfile.TemporaryDirectory() as folder:
            with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
                for place, record in enumerate(shard.records, start=shard.first):
                    try:
                        facts = guarded(_pack_sample, record, settings, folder, timeout_seconds=timeout_seconds)
                    except GuardError as error:
                        skipped[f"{place:09d}"] = str(error)
                        continue
                    _add_sample(file, f"{place:09d}", facts, Path(folder))
            # Written before the shard appears: if the shard exists, the list of skipped samples is complete.
            if skipped:
                store.write(shard.skipped_name, (json.dumps(skipped, indent=2) + "\n").encode())
            elif store.exists(shard.skipped_name):  # left by an attempt that was killed
                store.delete(shard.skipped_name)
        found = _finished(store, shard)
        if found is None:
            raise PackError(f"{shard.name}: is not whole after it was written to {store.root}")
    rows, skipped = found
    return rows, {str(shard.records[int(key) - shard.first].path): reason for key, reason in skipped.items()}


def _finished(store: Store, shard: _Shard) -> tuple[list[dict[str, Any]], dict[str, str]] | None:
    """The rows of a shard and ``{key: reason}`` of skipped samples; None if the shard is damaged or incomplete."""
    try:
        rows = _shard_rows(store, shard.name)
        skipped = json.loads(store.read(shard.skipped_name)) if store.exists(shard.skipped_name) else {}
    except (PackError, ValueError):
        return None
    keys = {row["key"] for row in rows} | set(skipped)
    return (rows, skipped) if keys == {f"{shard.first + i:09d}" for i in range(len(shard.records))} else None


def _pack_sample(record: MediaRecord, settings: PackSettings, folder: str) -> dict[str, Any]:
    """Transcode one sample into the files sample.* of a folder, and return the contents of its .json."""
    stem = Path(folder) / "sample"
    for ending in _ENDINGS:
        stem.with_suffix(f".{ending}").unlink(missing_ok=True)
    path = Path(record.path)
    transcode(path, record.start_seconds, record.duration_seconds, settings, stem)
    infos = {e: probe(stem.with_suffix(f".{e}")) for e in ("mp4", "flac") if stem.with_suffix(f".{e}").exists()}
    nothing = MediaInfo(0.0, 0.0, 0, 0, False, 0)
    picture, sound = infos.get("mp4", nothing), infos.get("flac", nothing)
    return {
        "duration_seconds": record.duration_seconds,
        "fps": picture.fps,
        "width": picture.width,
        "height": picture.height,
        "has_audio": sound.has_audio,
        "audio_rate_hz": sound.audio_rate_hz,
        "label": record.label,
        "split": record.split,
        "group": record.group,
        "content_hash": record.content_hash,
        "findings": ",".join(record.findings) or None,
        "source": path.name,
        "source_start_seconds": record.start_seconds,
    }


def _add_sample(tar: tarfile.TarFile, key: str, facts: dict[str, Any], folder: Path) -> None:
    (folder / "sample.json").write_text(json.dumps({"key": key, **facts}, ensure_ascii=False), encoding="utf-8")
    for ending in _ENDINGS:
        path = folder / f"sample.{ending}"
        if path.exists():
            # Only name, size and content, no date or owner, so that the same sample always gives the same bytes.
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(member, content)


def _shard_rows(store: Store, name: str) -> list[dict[str, Any]]:
    """The index rows of a shard, read from the shard.

    Raises
    ------
    PackError
        The shard is not a complete tar file, or the .json of a sample is missing.
    """
    rows: dict[str, dict[str, Any]] = {}
    try:
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                row = rows.setdefault(key, dict.fromkeys(_INDEX_SCHEMA.names))
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size:
                    raise PackError(f"{name}: ends in the middle of {member.name}")
                kind = {"mp4": "video", "flac": "audio", "json": "json"}[ending]
                row |= {f"{kind}_offset": member.offset_data, f"{kind}_size": len(data)}
                row[f"{ending}_sha256"] = hashlib.sha256(data).hexdigest()
                if ending == "json":
                    facts = json.loads(data)
                    row |= {field: value for field, value in facts.items() if field in row}
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"{name}: is no shard that can be read ({type(error).__name__}: {error})") from error
    lacking = next((key for key, row in rows.items() if row["json_size"] is None), None)
    if lacking is not None:
        raise PackError(f"{name}: sample {lacking} has no .json")
    # An index beside its shards has relative paths, so that the folder can be moved; at a URL it needs full ones.
    path = store.address(name) if "://" in store.root else name
    return [row | {"path": path, "start_seconds": 0.0} for row in rows.values()]


def _read_index(store: Store) -> pa.Table:
    try:
        with store.open(INDEX) as file:
            return pq.read_table(pa.BufferReader(file.read())).select(_INDEX_SCHEMA.names)
    except (FileNotFoundError, KeyError, pa.ArrowException) as error:
        raise PackError(
            f"pack {store.root}: must hold {INDEX}, which a pack that came to its end has ({type(error).__name__})"
        ) from error
