"""The samples of an index: files, segments and members of shards; their mean vectors, and manifests of some of them.

A list of samples is a manifest, which `cmacc pretrain`, `pack` and `embed` take as it is, and `cmacc scan` with
``--only``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from cmacc.clips import ChosenSample, Manifest, MediaRecord
from cmacc.encoders import MODALITIES
from cmacc.pretraining.clip_encoder import Modality
from cmacc.pretraining.features import unit_rows
from cmacc.search.embed import is_content
from cmacc.search.table import SAMPLE, Rows, SearchError, WindowTable

_FACTS = (*SAMPLE, "label", "content_hash")


@dataclass(frozen=True)
class Samples:
    """The n samples of an index, sorted by path, key and start, and their windows.

    Attributes
    ----------
    facts
        ``(n,)``: a table of path, key, sample_start_seconds, sample_end_seconds, label and content_hash.
    rows
        The windows of each modality.
    of_row
        For each modality, the sample of every window.
    root
        Folder or URL that paths are relative to.
    hop_seconds
        Distance between the starts of windows.
    """

    facts: pa.Table
    rows: dict[Modality, Rows]
    of_row: dict[Modality, Int[np.ndarray, " rows"]]
    root: str
    hop_seconds: float

    @classmethod
    def of(cls, table: WindowTable, where: str | None = None) -> "Samples":
        """Read all windows into memory: 4 bytes for each number of a vector, and twice that while they are sorted.

        Parameters
        ----------
        table
            The table of the index.
        where
            Read only those for which a condition in SQL holds.

        Raises
        ------
        SearchError
            The index has no windows.
        """
        rows = {modality: table.rows(modality, where=where) for modality in MODALITIES}
        firsts = [one.facts.take(pa.array(one.first[:-1])).select(_FACTS) for one in rows.values()]
        every = pa.concat_tables(firsts).combine_chunks()
        if len(every) == 0:
            raise SearchError(f"index {table.store.root}: it has no videos yet; run cmacc embed again")
        # A sample with both modalities stands there twice. `Rows` knows where the next one begins.
        order = pc.sort_indices(every, [(name, "ascending") for name in SAMPLE])
        begins = Rows(every.take(order), np.empty((len(every), 0), np.float32)).first[:-1]
        sample_of = np.empty(len(every), np.int64)
        sample_of[order.to_numpy()] = np.searchsorted(begins, np.arange(len(every)), side="right") - 1
        parts = np.split(sample_of, [len(firsts[0])])
        of_row = {m: np.repeat(ids, np.diff(rows[m].first)) for m, ids in zip(MODALITIES, parts, strict=True)}
        facts = every.take(order.take(pa.array(begins)))
        return cls(facts, rows, of_row, table.description.root, table.description.hop_seconds)

    def __len__(self) -> int:
        return int(self.facts.num_rows)

    def column(self, name: str) -> list[Any]:
        """A column of the facts."""
        values: list[Any] = self.facts.column(name).to_pylist()
        return values

    @property
    def names(self) -> list[str]:
        """The path of each sample, with its key or start if it is not a whole file."""
        columns = map(self.column, SAMPLE)
        return [
            f"{path}, {key}" if key is not None else f"{path}, from {start:g} s" if start else path
            for path, key, start, _ in zip(*columns, strict=True)
        ]

    @property
    def start_seconds(self) -> Float[np.ndarray, " samples"]:
        """Start of every sample in its file."""
        return np.asarray(self.facts.column("sample_start_seconds").to_numpy())

    @property
    def end_seconds(self) -> Float[np.ndarray, " samples"]:
        """End of every sample in its file."""
        return np.asarray(self.facts.column("sample_end_seconds").to_numpy())

    def has(self, modality: Modality) -> Bool[np.ndarray, " samples"]:
        """Which samples have windows of a modality."""
        return np.bincount(self.of_row[modality], minlength=len(self)) > 0

    def means(self, modality: Modality) -> Float[np.ndarray, "samples dim"]:
        """Mean vector of each sample's windows, of unit length; zero for samples without the modality."""
        rows = self.rows[modality]
        means = np.zeros((len(self), rows.vectors.shape[1]), np.float32)
        if len(rows):
            sums = np.add.reduceat(rows.vectors, rows.first[:-1], axis=0)
            means[self.of_row[modality][rows.first[:-1]]] = unit_rows(sums)
        return means

    def find(self, chosen: Sequence[ChosenSample]) -> list[list[int]]:
        """For every entry of a list, the numbers of its samples; more than one if it names a file with segments."""
        of_path: dict[str, list[int]] = {}
        for number, path in enumerate(self.column("path")):
            of_path.setdefault(path, []).append(number)
        keys, starts = self.column("key"), self.column("sample_start_seconds")

        def is_meant(one: ChosenSample, number: int) -> bool:
            if one.start_seconds is None:
                return True
            return bool(one.key == keys[number] and abs(one.start_seconds - starts[number]) < 1e-3)

        within = _PathsWithin(self.root)
        return [[n for n in of_path.get(within(one.path), ()) if is_meant(one, n)] for one in chosen]

    def manifest(self, numbers: Sequence[int], source: Manifest | None = None) -> Manifest:
        """A manifest of some samples, in the order given.

        Parameters
        ----------
        numbers
            The samples.
        source
            The manifest that was embedded, whose rows are taken over. It also has what an index does not keep: split,
            group, findings, and the places of packed samples in their shards. Default: rows of what the index knows,
            without opening a file.

        Raises
        ------
        SearchError
            A sample is not in ``source``, or is packed and there is no ``source``.
        """
        if source is None:
            return Manifest(self._records(numbers))
        columns = map(source.column, ("path", "key", "start_seconds"))
        found = self.find([ChosenSample(*row) for row in zip(*columns, strict=True)])
        row_of = {number: row for row, listed in enumerate(found) for number in listed}
        absent = [number for number in numbers if number not in row_of]
        if absent:
            raise SearchError(
                f"--manifest: must be the manifest that was embedded, got one without {len(absent)} of {len(numbers)} "
                f"samples, such as {self.names[absent[0]]}"
            )
        return Manifest.of_table(source.table.take(pa.array([row_of[number] for number in numbers], pa.int64())))

    def _records(self, numbers: Sequence[int]) -> list[MediaRecord]:
        has_video, has_audio = self.has("video"), self.has("audio")
        records = []
        for number in numbers:
            (fact,) = self.facts.slice(number, 1).to_pylist()
            if fact["key"] is not None:
                raise SearchError(
                    f"{self.names[number]} of the index is a packed sample: name its manifest with --manifest, the "
                    "index.parquet of the pack"
                )
            start, content = fact["sample_start_seconds"], fact["content_hash"]
            records.append(
                MediaRecord(
                    path=f"{self.root}/{fact['path']}",
                    duration_seconds=fact["sample_end_seconds"] - start,
                    fps=0.0,  # unknown, as in a manifest written by hand; so is the size
                    width=int(has_video[number]),
                    height=int(has_video[number]),
                    has_audio=bool(has_audio[number]),
                    audio_rate_hz=0,
                    label=fact["label"],
                    start_seconds=start,
                    content_hash=content if content is not None and is_content(content) else None,
                )
            )
        return records


class _PathsWithin:
    """Makes paths relative to a root; links in the folders of local ones are resolved."""

    def __init__(self, root: str) -> None:
        self._is_local = "://" not in root
        self._root = os.path.realpath(root) if self._is_local else root

    def __call__(self, path: str) -> str:
        if self._is_local and os.path.isabs(path):
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return path.removeprefix(f"{self._root}/")
