"""Train a run folder (``cmacc pretrain``): metrics, checkpoints, log and resumption."""

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor

from cmacc.clips import Manifest
from cmacc.clips.progress import Progress, silent
from cmacc.pretraining.agreement import check_ranks
from cmacc.pretraining.checkpoint import load_checkpoint, random_states, save_checkpoint
from cmacc.pretraining.checkpoint_files import mark_best, whole_checkpoint
from cmacc.pretraining.clip_stream import ClipStream, RunError
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.config_files import read_config
from cmacc.pretraining.dump import write_dump
from cmacc.pretraining.health import CollapseAlarm, dictionaries_health, embedding_health
from cmacc.pretraining.kept_features import keep_features
from cmacc.pretraining.learner import Learner, input_buffer
from cmacc.pretraining.online import SCORE, OnlineEvaluation
from cmacc.pretraining.problem import Problem
from cmacc.pretraining.processes import Processes
from cmacc.pretraining.provenance import Provenance
from cmacc.pretraining.run_folder import RANK_LOGS, ROWS_FILE, check_provenance
from cmacc.pretraining.run_log import MetricsFile, log_to
from cmacc.pretraining.step import DivergenceError
from cmacc.pretraining.table import TableProblem
from cmacc.pretraining.tracking import tracked
from cmacc.pretraining.trainer import TrainedStep, Trainer
from cmacc.pretraining.utilisation import Utilisation

log = logging.getLogger("cmacc")

OnStep = Callable[[int, int, dict[str, float]], None]
_Result = TypeVar("_Result")


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

    In several processes (torchrun, ``accelerate launch``, ``cmacc pretrain --processes``), all of them call it.

    Parameters
    ----------
    run_dir
        Run folder from `start_run`, possibly partly trained.
    on_step
        Called after every step with (steps done, total steps, metrics of the step).
    should_stop
        Called after every step; if it returns true on any process, the state is saved and `pretrain` returns on all.
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
    # Of a machine without GPU, accelerate would take several processes for unrelated ones unless told.
    is_of_several = os.environ.get("WORLD_SIZE", "1") != "1"
    device = PartialState(cpu=is_of_several and not torch.cuda.is_available()).device
    processes = Processes.current(device)
    with log_to(run_dir / ("run.log" if processes.is_first else RANK_LOGS.replace("*", str(processes.rank)))):
        provenance = check_provenance(run_dir, config, manifest)
        if config.data.shuffle_pairs and processes.count > 1:
            raise RunError(
                f"data.shuffle_pairs must be false in {processes.count} processes, because each would shuffle its own "
                "part of a batch, got true; run this control in one process"
            )
        problem: Problem
        if config.keeps_features:
            table = keep_features(manifest, config, device, cache=cache, progress=progress)
            _by_first(processes, lambda: _check_rows(run_dir, table.files))
            if len(set(processes.objects(table.files))) > 1:
                raise RunError(f"run {run_dir}: the same files must decode on all processes, got others; try again")
            problem, count, bad_files = TableProblem(table, config, device), len(table.labels), table.bad_files
        else:
            clips = ClipStream(manifest, config, device)
            problem, count, bad_files = clips, len(clips.plan.sample_ids), clips.bad_files
        evaluation = _evaluation(manifest, config, processes, cache, progress) if config.eval_every else None
        trainer = Trainer(problem, config, device)
        first_step = resume(trainer, run_dir, provenance)
        check_ranks(trainer.learner, first_step)
        log.info(
            "%s files, %s steps of %s clips (%.1f epochs), from step %s, on %s, %s%s",
            count, config.optim.steps, config.optim.batch_size,
            config.optim.steps / max(1, count // config.optim.batch_size), first_step, device,
            trainer.learner.autocast_dtype or "float32",
            f", in {processes.count} processes" if processes.count > 1 else "",
        )  # fmt: skip
        run_id = "" if provenance is None else provenance.run_id
        alarm = CollapseAlarm(min(config.optim.batch_size, config.encoder.embedding_size))
        utilisation: Utilisation | None = None
        with (
            MetricsFile(run_dir / "metrics.jsonl", first_step, is_first=processes.is_first) as metrics_file,
            tracked(run_dir, config, run_id, first_step, is_first=processes.is_first) as track,
        ):
            score = metrics_file.last_row.get(SCORE)
            if score is not None and metrics_file.last_row["step"] == first_step - 1:
                # It was killed between the saving of this checkpoint and its mark, or it is marked already.
                mark_best(run_dir, first_step, score, SCORE)
            try:
                for done in trainer.steps():
                    row, step = done.metrics, done.step + 1
                    if utilisation is None:
                        utilisation = _utilisation(trainer, done)
                    asked = torch.tensor([float(should_stop()), row["seconds/data"]])
                    stops, waited = processes.each(asked).unbind(1)
                    stop, row["data_share"] = bool(stops.any()), float(waited.max()) / row["seconds/step"]
                    row |= utilisation.row(row["clips_per_second"])
                    if done.step % config.health_every == 0:
                        row |= _health(trainer, done)
                        alarm.check(row, done.step)
                    is_last = stop or step == config.optim.steps
                    evaluated: dict[str, float] = {}
                    if evaluation is not None and (step % config.eval_every == 0 or step == config.optim.steps):
                        evaluated = evaluation.measured(trainer.learner.encoder)
                        row |= evaluated
                    metrics_file.write(done.step, row)
                    track(row, done.step)
                    if config.check_ranks_every and step % config.check_ranks_every == 0:
                        check_ranks(trainer.learner, done.step)
                    if is_last or step % config.save_every == 0 or evaluated:
                        metrics_file.flush()
                        _save(trainer.learner, run_dir, step, provenance, evaluated.get(SCORE))
                    if on_step is not None:
                        on_step(step, config.optim.steps, row)
                    if stop:
                        break
            except DivergenceError as error:
                _dump(trainer, run_dir, error, manifest)
                raise RunError(f"run {run_dir}: {error}") from error
        log.info(
            "stopped at step %s of %s; %s files did not decode",
            trainer.next_step,
            config.optim.steps,
            len(bad_files),
        )
    return RunOutcome(run_dir, trainer.next_step, config.optim.steps, bad_files)


def _evaluation(
    manifest: Manifest, config: PretrainConfig, processes: Processes, cache: Path | None, progress: Progress
) -> OnlineEvaluation:
    return OnlineEvaluation(
        manifest,
        config,
        processes.device,
        rank=processes.rank,
        count=processes.count,
        gather=processes.gather,
        cache=cache,
        progress=progress,
    )


def _utilisation(trainer: Trainer, done: TrainedStep) -> Utilisation:
    learner = trainer.learner
    inputs = learner.views.of(done.batch, trainer.problem.visit(done.step))
    return Utilisation.measured(
        learner.encoder,
        {modality: rows[:2] for modality, rows in inputs.items() if modality in learner.trained_modalities},
        learner.key_encoder if learner.needs_keys else None,
        learner.device,
        learner.autocast_dtype,
        learner.processes.count,
    )


def _health(trainer: Trainer, done: TrainedStep) -> dict[str, float]:
    """Health of the batch's embeddings and of the dictionaries."""
    learner = trainer.learner
    labels = learner.processes.gather(done.batch.labels)
    return embedding_health(done.embeddings) | dictionaries_health(learner, labels, trainer.problem.labels, done.step)


def _save(learner: Learner, run_dir: Path, step: int, provenance: Provenance | None, score: float | None) -> None:
    """Save a checkpoint, by the first process; with a score, it may become the best one. A collective.

    Raises
    ------
    CheckpointError, DivergenceError, RunError
        It was not saved; raised on all processes.
    """
    processes = learner.processes
    whole_pools = learner.whole_pools()
    random: dict[str, Tensor] = {}
    for states in processes.objects(random_states(processes.rank)):
        random |= states

    def save() -> None:
        save_checkpoint(
            learner, run_dir, step, learner.config.keep_every, provenance,
            processes=processes.count, random=random, gathered=whole_pools,
        )  # fmt: skip
        if score is not None:
            mark_best(run_dir, step, score, SCORE)

    _by_first(processes, save)


def _by_first(processes: Processes, work: Callable[[], _Result]) -> _Result:
    """What the first process's work returns, on all processes; what it raises, all raise (the others a `RunError`)."""
    outcome: tuple[_Result | None, str | None] = (None, None)
    failure: Exception | None = None
    if processes.is_first:
        try:
            outcome = (work(), None)
        except (ValueError, OSError) as error:
            outcome, failure = (None, str(error)), error
    result, reason = processes.objects(outcome)[0]
    if failure is not None:
        raise failure
    if reason is not None:
        raise RunError(reason)
    return cast(_Result, result)


def _dump(trainer: Trainer, run_dir: Path, error: DivergenceError, manifest: Manifest) -> None:
    """Write what is needed to find out why a step was not finite."""
    if error.batch is None:
        return
    learner, ids = trainer.learner, error.batch.sample_ids.tolist()
    try:
        folder = write_dump(
            run_dir,
            error.step,
            learner.processes.rank,
            reason=str(error),
            sample_ids=ids,
            inputs=learner.views.of(error.batch, trainer.problem.visit(error.step)),
            model=learner.encoder,
            paths=None if trainer.config.keeps_features else [str(manifest.records[i].path) for i in ids],
        )
    except (OSError, SafetensorError) as reason:
        log.warning("the last step is not written down for a look at it: %s", reason)
    else:
        log.warning("the inputs of the last step are in %s", folder)


def resume(trainer: Trainer, run_dir: Path, provenance: Provenance | None) -> int:
    """Restore the state and the input buffer from the newest checkpoint that can be read; return the next step."""
    learner, config, problem, processes = trainer.learner, trainer.config, trainer.problem, trainer.learner.processes
    # One process looks for it, since it renames damaged ones.
    folder = _by_first(processes, lambda: whole_checkpoint(run_dir))
    if folder is None:
        return 0
    loaded = load_checkpoint(learner, folder, provenance, rank=processes.rank, own_part=learner.own_part)
    if loaded.processes != processes.count:
        log.warning(
            "the run goes on in %s processes, before it was in %s: with the same batches and keys, but sums in another "
            "order, so that results differ in their last digits%s",
            processes.count, loaded.processes,
            "; batch norm and dropout of the backbones, if any, are over other parts of the batches"
            if config.encoder.norm == "batch" or config.trains_tower else "",
        )  # fmt: skip
    trainer.next_step = loaded.step
    if learner.input_buffer is not None:
        size = processes.part_size(config.optim.batch_size)
        first = max(0, loaded.step - math.ceil(learner.input_buffer.capacity / size))
        log.info("reading the batches of steps %s to %s again, to re-encode their keys", first, loaded.step - 1)
        learner.input_buffer = input_buffer(config, processes, first * size)
        assert learner.input_buffer is not None
        for number, batch in enumerate(problem.batches(first, loaded.step), start=first):
            learner.input_buffer.push(learner.views.kept(batch, problem.visit(number)))
    return loaded.step


def _check_rows(run_dir: Path, files: str) -> None:
    """Check that a run resumes with the rows that it began with: dictionaries and orders know files by their row."""
    path = run_dir / ROWS_FILE
    if not path.exists():
        path.write_text(json.dumps({"files": files}))
    elif json.loads(path.read_text()).get("files") != files:
        raise RunError(
            f"run {run_dir}: the same files must decode as when it began, got others; restore them, or start a new run"
        )
