"""Train a run folder (``cmacc pretrain``): metrics, checkpoints, log and resumption."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from cmacc.clips import Manifest
from cmacc.clips.progress import Progress, silent
from cmacc.pretraining.checkpoint import CheckpointError, last_checkpoint, load_checkpoint, save_checkpoint
from cmacc.pretraining.clip_stream import ClipStream, RunError
from cmacc.pretraining.config import read_config
from cmacc.pretraining.health import dictionaries_health
from cmacc.pretraining.kept_features import keep_features
from cmacc.pretraining.learner import input_buffer
from cmacc.pretraining.problem import Problem
from cmacc.pretraining.provenance import Provenance
from cmacc.pretraining.run_folder import ROWS_FILE, check_provenance
from cmacc.pretraining.step import DivergenceError
from cmacc.pretraining.table import TableProblem
from cmacc.pretraining.trainer import Trainer

log = logging.getLogger("cmacc")

OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class RunOutcome:
    """Result of a call of `pretrain`: the reached ``step`` of ``steps``, and the files that did not decode."""

    run_dir: Path
    step: int
    steps: int
    bad_files: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return self.step == self.steps


def pretrain(
    run_dir: Path,
    *,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> RunOutcome:
    """Train the run in ``run_dir`` to its end, from its last checkpoint or from the start.

    Parameters
    ----------
    run_dir
        Run folder from `start_run`, possibly partly trained.
    on_step
        Called after every step with (steps done, total steps, metrics of the step).
    should_stop
        Called after every step; if it returns true, the state is saved and `pretrain` returns.
    cache
        Folder of kept features, for frozen backbones; None: they are computed at every start.
    progress
        Called while features are computed, with ("features of files", files done, total files).

    Raises
    ------
    RunError
        There are too few usable files, or too many do not decode; the data or the settings have changed since the run
        started; or the loss is no longer finite.
    ManifestError, ConfigError, CheckpointError
        A file of the run cannot be read.
    """
    config = read_config(run_dir / "config.yaml")
    manifest = Manifest.read(config.data.manifest)
    with _log_to(run_dir / "run.log"):
        provenance = check_provenance(run_dir, config, manifest)
        # We set the precision (`autocast_dtype`), because accelerate's setting cannot change within one Python process.
        accelerator = Accelerator(log_with="tensorboard", project_dir=str(run_dir))
        device = accelerator.device
        problem: Problem
        if config.keeps_features:
            table = keep_features(manifest, config, device, cache=cache, progress=progress)
            _check_rows(run_dir, table.files)
            problem, count, bad_files = TableProblem(table, config, device), len(table.labels), table.bad_files
        else:
            clips = ClipStream(manifest, config, device)
            problem, count, bad_files = clips, len(clips.plan.sample_ids), clips.bad_files
        trainer = Trainer(problem, config, device)
        first_step = _resume(trainer, run_dir, provenance)
        log.info(
            "%s files, %s steps of %s clips (%.1f epochs), from step %s, on %s, %s",
            count, config.optim.steps, config.optim.batch_size,
            config.optim.steps / max(1, count // config.optim.batch_size), first_step, device,
            trainer.learner.autocast_dtype or "float32",
        )  # fmt: skip
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step}})
        with _MetricsFile(run_dir / "metrics.jsonl", first_step) as metrics_file:
            try:
                for done in trainer.steps():
                    row = done.metrics
                    if done.step % config.health_every == 0:
                        row |= dictionaries_health(trainer.learner, done.batch.labels, problem.labels, done.step)
                    metrics_file.write(done.step, row)
                    accelerator.log(row, step=done.step)
                    step = done.step + 1
                    stop = should_stop()
                    if stop or step == config.optim.steps or step % config.save_every == 0:
                        metrics_file.flush()
                        save_checkpoint(trainer.learner, run_dir, step, config.keep_every, provenance)
                    if on_step is not None:
                        on_step(step, config.optim.steps, row)
                    if stop:
                        break
            except DivergenceError as error:
                raise RunError(f"run {run_dir}: {error}; its last checkpoint is from before that") from error
        accelerator.end_training()
        log.info(
            "stopped at step %s of %s; %s files did not decode",
            trainer.next_step,
            config.optim.steps,
            len(bad_files),
        )
    return RunOutcome(run_dir, trainer.next_step, config.optim.steps, bad_files)


def _resume(trainer: Trainer, run_dir: Path, provenance: Provenance | None) -> int:
    """Restore the state and the input buffer from the last checkpoint; return the next step."""
    try:
        folder = last_checkpoint(run_dir)
    except CheckpointError:
        return 0
    step = load_checkpoint(trainer.learner, folder, provenance)
    trainer.next_step = step
    learner, config, problem = trainer.learner, trainer.config, trainer.problem
    if learner.input_buffer is not None:
        first = max(0, step - math.ceil(learner.input_buffer.capacity / config.optim.batch_size))
        log.info("reading the batches of steps %s to %s again, to re-encode their keys", first, step - 1)
        learner.input_buffer = input_buffer(config, learner.device, first * config.optim.batch_size)
        assert learner.input_buffer is not None
        for number, batch in enumerate(problem.batches(first, step), start=first):
            learner.input_buffer.push(learner.views.kept(batch, problem.visit(number)))
    return step


def _check_rows(run_dir: Path, files: str) -> None:
    """Check that a run resumes with the rows that it began with: dictionaries and orders know files by their row."""
    path = run_dir / ROWS_FILE
    if not path.exists():
        path.write_text(json.dumps({"files": files}))
    elif json.loads(path.read_text()).get("files") != files:
        raise RunError(
            f"run {run_dir}: the same files must decode as when it began, got others; restore them, or start a new run"
        )


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


class _MetricsFile:
    """``metrics.jsonl``: one JSON object per step. Rows from ``first_step`` on, from a killed run, are removed."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] < first_step else []
                except json.JSONDecodeError:
                    break  # a line that was truncated by a kill
        aside = path.with_name(f".{path.name}")
        aside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(aside, path)
        self._file = path.open("a")

    def __enter__(self) -> "_MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, row: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **row}) + "\n")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
