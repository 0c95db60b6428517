"""Indexes of given vectors, without an encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmacc.pretraining.clip_encoder import Modality
from cmacc.search.samples import Samples
from cmacc.search.table import Description, WindowTable, table_schema
from cmacc.search.writer import WindowWriter

Vectors = NDArray[np.floating[Any]]
WINDOW_SECONDS = 2.0


def make_index(
    folder: Path,
    films: Mapping[str, Mapping[Modality, Vectors]],
    *,
    root: Path | str = "/films",
    labels: Mapping[str, str] | None = None,
    facts: Sequence[Mapping[str, object]] = (),
) -> Path:
    """An index with a window every second. ``films``: path -> modality -> ``(windows, d)``; ``facts`` override."""
    size = len(next(iter(next(iter(films.values())).values()))[0])
    description = Description("made", "0" * 16, str(root), WINDOW_SECONDS, 1.0, size, {})
    rows = []
    overrides = list(facts) or [{}] * len(films)
    for (path, by_modality), override in zip(films.items(), overrides, strict=True):
        seconds = max(map(len, by_modality.values())) - 1 + WINDOW_SECONDS
        for modality, vectors in by_modality.items():
            for second, vector in enumerate(vectors):
                row = {
                    "path": path, "key": None, "sample_start_seconds": 0.0, "sample_end_seconds": seconds,
                    "start_seconds": float(second), "end_seconds": second + WINDOW_SECONDS, "modality": modality,
                    "label": (labels or {}).get(path), "content_hash": path, "weights": "0" * 16,
                    "vector": (vector / np.linalg.norm(vector)).astype(np.float16),
                }  # fmt: skip
                rows.append(row | override)
    WindowWriter(folder, description).add(pa.Table.from_pylist(rows, schema=table_schema(description)))
    return folder


def read(folder: Path) -> Samples:
    """The samples of an index."""
    return Samples.of(WindowTable(folder))
