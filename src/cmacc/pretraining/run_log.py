"""What a run writes at every step: ``metrics.jsonl`` and its log."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cmacc.clips.storage import written_aside
from cmacc.pretraining.clip_stream import RunError

log = logging.getLogger("cmacc")


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Within it, what cmacc logs is appended to a file, the error that ends the run too."""
    handler = _LogFile(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except (ValueError, OSError) as error:
        log.error("the run ends: %s", error)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with suppress(OSError):
            handler.close()


class _LogFile(logging.FileHandler):
    """A log that is silent on a full disk, of which the metrics tell, instead of printing tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class MetricsFile:
    """``metrics.jsonl``: one JSON object per step. Rows from ``first_step`` on, from a killed run, are removed.

    Only the first process reads and writes it. ``last_row`` is the last one that is kept.
    """

    def __init__(self, path: Path, first_step: int, *, is_first: bool) -> None:
        self.last_row: dict[str, float] = {}
        self._path = path
        self._file: TextIO | None = None
        if not is_first:
            return
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line that was truncated by a kill
                if row["step"] < first_step:
                    kept.append(line)
                    self.last_row = row
        with self._named():
            with written_aside(path) as aside:
                aside.write_text("".join(f"{line}\n" for line in kept))
            self._file = path.open("a")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None:
            # After an error, that is the one to tell: closing tries again to write what could not be written.
            with suppress(OSError) if kind else self._named():
                self._file.close()

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append the metrics of a step."""
        if self._file is not None:
            with self._named():
                self._file.write(json.dumps({"step": step, **row}) + "\n")

    def flush(self) -> None:
        """Wait until all rows are on disk."""
        if self._file is not None:
            with self._named():
                self._file.flush()
                os.fsync(self._file.fileno())

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"run {self._path.parent}: {self._path.name} cannot be written ({error}); its checkpoints remain: "
                "resume it when there is space"
            ) from error
