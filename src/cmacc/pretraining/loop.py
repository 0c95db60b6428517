"""The training loop: from a config and a run folder to checkpoints and metrics."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from cmacc.clips import FINDINGS, Manifest, TrainingPlan, training_loader
from cmacc.pretraining.checkpoint import CheckpointError, last_checkpoint, load_checkpoint, save_checkpoint
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.config import OptimConfig, PretrainConfig, read_config, write_config
from cmacc.pretraining.health import dictionary_health
from cmacc.pretraining.learner import Learner, input_buffer
from cmacc.pretraining.step import training_step

log = logging.getLogger("cmacc")

# Findings of a scan that leave nothing to learn from a pair, or would make a sample its own negative.
_NOT_TRAINED_ON = ("silent", "black", "still", "duplicate")

OnStep = Callable[[int, int, dict[str, float]], None]


class RunError(ValueError):
    """A run that cannot begin or go on; the message says why and the way out."""


@dataclass(frozen=True)
class RunOutcome:
    """Where a call of `pretrain` ended: ``step`` of ``steps``, and the bad files met on the way."""

    run_dir: Path
    step: int
    steps: int
    bad_files: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether the run is at its end, or was stopped before."""
        return self.step == self.steps


def start_run(config: PretrainConfig, run_dir: Path, *, overwrite: bool = False) -> None:
    """Make a run folder that holds the config and nothing else of a run.

    Raises
    ------
    RunError
        The folder holds a run already and ``overwrite`` is not set.
    """
    leftovers = [run_dir / name for name in ("config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "run.log")]
    present = [path for path in leftovers if path.exists()]
    # A config alone is what a start that failed on its input leaves: nothing is lost with it.
    has_trained = any(path.name in ("metrics.jsonl", "checkpoints") for path in present)
    if has_trained and not overwrite:
        raise RunError(
            f"run folder {run_dir}: holds a run already; go on with it (--resume {run_dir}), choose another folder, "
            "or give --overwrite to lose it"
        )
    for path in present:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir / "config.yaml")


def pretrain(
    run_dir: Path,
    *,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunOutcome:
    """Train the run in ``run_dir`` from its last checkpoint, or from the beginning, to its end.

    Parameters
    ----------
    run_dir
        Made by `start_run`, possibly trained on for a while.
    on_step
        Called after every step with (steps done, steps of the run, the step's metrics).
    should_stop
        Asked after every step; when it says yes, the state is saved and the call returns.

    Raises
    ------
    RunError
        There are too few usable files, or too many bad ones; or the loss is no longer finite.
    ManifestError, ConfigError, CheckpointError
        What the run folder points to cannot be read.
    """
    config = read_config(run_dir / "config.yaml")
    manifest = Manifest.read(config.data.manifest)
    with _log_to(run_dir / "run.log"):
        sample_ids, bad_files = usable_files(manifest, config)
        # Precision is ours (`autocast_dtype`): accelerate's own setting cannot change within one Python process.
        accelerator = Accelerator(log_with="tensorboard", project_dir=str(run_dir))
        learner = Learner.build(config, accelerator.device, autocast_dtype(config, accelerator.device))
        first_step = _resume(learner, run_dir)
        plan = training_plan(manifest, sample_ids, config)
        log.info(
            "%s files, %s steps of %s clips (%.1f epochs), from step %s, on %s, %s",
            len(sample_ids), config.optim.steps, config.optim.batch_size, config.optim.steps / plan.steps_per_epoch,
            first_step, accelerator.device, learner.autocast_dtype or torch.float32,
        )  # fmt: skip
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step}})
        labels_by_id = torch.tensor(manifest.label_indices(), dtype=torch.int64, device=accelerator.device)
        loader = training_loader(
            plan,
            config.data.clip,
            first_step=first_step,
            last_step=config.optim.steps,
            workers=config.data.workers,
            start_method=config.data.start_method,
            pin_memory=accelerator.device.type == "cuda",
        )
        if first_step > 0:
            _refill_inputs(learner, plan, first_step)
        step = first_step
        with _MetricsFile(run_dir / "metrics.jsonl", first_step) as metrics_file:
            waiting_since = time.perf_counter()
            for batch in loader:
                started = waiting_since
                clock = PhaseClock(accelerator.device)
                clock.add("data", time.perf_counter() - started)
                for sample_id, reason in batch.failures.items():
                    _note_bad_file(bad_files, str(manifest.records[sample_id].path), reason)
                _check_bad_share(bad_files, len(manifest), config.data.max_bad_fraction)
                for group in learner.optimizer.param_groups:
                    group["lr"] = learning_rate(config.optim, step)
                result = training_step(learner, batch.to(accelerator.device), step, plan.visit(step), clock)
                row = result.metrics() | {"learning_rate": learning_rate(config.optim, step)}
                if learner.inputs is not None:
                    row |= {"refreshed_keys": result.refreshed, "refresh_bytes": learner.inputs.byte_count}
                if not math.isfinite(row["loss"]):
                    raise RunError(
                        f"run {run_dir}: the loss at step {step} is {row['loss']}; the last checkpoint stands, but a "
                        "new run with a lower optim.learning_rate or precision=fp32 is what helps"
                    )
                if step % config.health_every == 0:
                    row |= _health(learner, batch.labels.to(accelerator.device), labels_by_id, step)
                step += 1
                waiting_since = time.perf_counter()
                seconds = waiting_since - started
                row |= {f"seconds/{name}": value for name, value in clock.seconds().items()}
                row |= {"seconds/step": seconds, "clips_per_second": config.optim.batch_size / seconds}
                metrics_file.write(step - 1, row)
                accelerator.log(row, step=step - 1)
                stop = should_stop()
                if stop or step == config.optim.steps or step % config.save_every == 0:
                    metrics_file.flush()
                    save_checkpoint(learner, run_dir, step, config.keep_every)
                if on_step is not None:
                    on_step(step, config.optim.steps, row)
                if stop:
                    break
        accelerator.end_training()
        log.info("stopped at step %s of %s; %s bad files", step, config.optim.steps, len(bad_files))
    return RunOutcome(run_dir, step, config.optim.steps, bad_files)


def usable_files(manifest: Manifest, config: PretrainConfig) -> tuple[list[int], dict[str, str]]:
    """Sample ids to train on, and ``{path: reason}`` of the files of the split that are left out.

    Raises
    ------
    RunError
        More than ``data.max_bad_fraction`` of the files are unusable, or too few are left for a batch.
    """
    in_split = manifest.ids_where(lambda record: record.split in (None, config.data.split))
    bad_files: dict[str, str] = {}
    usable = []
    for sample_id in in_split:
        record = manifest.records[sample_id]
        if not record.has_audio:
            _note_bad_file(bad_files, str(record.path), "no sound")
        elif not record.has_picture:
            _note_bad_file(bad_files, str(record.path), "no picture")
        elif config.data.clip.short_files == "refuse" and record.duration_seconds < config.data.clip.length_seconds:
            _note_bad_file(bad_files, str(record.path), "shorter than a clip")
        elif (finding := next((name for name in _NOT_TRAINED_ON if name in record.findings), None)) is not None:
            _note_bad_file(bad_files, str(record.path), FINDINGS[finding])
        else:
            usable.append(sample_id)
    _check_bad_share(bad_files, len(in_split), config.data.max_bad_fraction)
    if len(usable) < config.optim.batch_size:
        raise RunError(
            f"manifest {config.data.manifest}: split {config.data.split!r} must hold at least optim.batch_size "
            f"({config.optim.batch_size}) files with picture and sound, got {len(usable)} of {len(manifest)} files"
        )
    renewable = config.dictionary.size + config.optim.batch_size
    if config.dictionary.selector != "none" and not config.dictionary.allow_repeats and len(usable) < renewable:
        raise RunError(
            f"dictionary.size must be at most the files to train on less optim.batch_size ({len(usable)} - "
            f"{config.optim.batch_size}), since no sample may stand in it twice, got {config.dictionary.size}; lower "
            "it, or set dictionary.allow_repeats=true"
        )
    return usable, bad_files


def training_plan(manifest: Manifest, sample_ids: Sequence[int], config: PretrainConfig) -> TrainingPlan:
    """Which clips each step of a run takes, of the files that `usable_files` found."""
    return TrainingPlan(
        manifest,
        tuple(sample_ids),
        config.data.clip.length_seconds,
        config.optim.batch_size,
        config.seed,
        config.data.clips_per_video,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Linear warm-up over ``warmup_steps``, then half a cosine down to zero at ``steps``.

    Examples
    --------
    >>> config = OptimConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    >>> [round(learning_rate(config, step), 3) for step in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def autocast_dtype(config: PretrainConfig, device: torch.device) -> torch.dtype | None:
    """bf16 where asked for, or where ``auto`` finds units for it; else None."""
    if config.precision == "auto":
        if device.type == "cuda":
            has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # AMX multiplies bf16 tiles in hardware; without it bf16 on a CPU is slower than float32.
            has_units = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_units else None
    return torch.bfloat16 if config.precision == "bf16" else None


def _resume(learner: Learner, run_dir: Path) -> int:
    try:
        folder = last_checkpoint(run_dir)
    except CheckpointError:
        return 0
    return load_checkpoint(learner, folder)


def _refill_inputs(learner: Learner, plan: TrainingPlan, step: int) -> None:
    """The inputs that were kept when the run stopped: those of the last steps' batches, read again."""
    if learner.inputs is None:
        return
    config = learner.config
    first = max(0, step - math.ceil(learner.inputs.capacity / config.optim.batch_size))
    log.info("reading the clips of steps %s to %s again, to encode their keys anew", first, step - 1)
    learner.inputs = input_buffer(config, learner.device, first * config.optim.batch_size)
    assert learner.inputs is not None
    loader = training_loader(
        plan,
        config.data.clip,
        first_step=first,
        last_step=step,
        workers=config.data.workers,
        start_method=config.data.start_method,
    )
    for number, batch in enumerate(loader, start=first):
        learner.inputs.push(learner.views.kept(batch, plan.visit(number)))


def _health(learner: Learner, query_labels: torch.Tensor, labels_by_id: torch.Tensor, step: int) -> dict[str, float]:
    health: dict[str, float] = {}
    for name, dictionary in (("audio", learner.audio_dictionary), ("video", learner.video_dictionary)):
        if dictionary is not None:
            measured = dictionary_health(dictionary.negatives(), query_labels, labels_by_id, step)
            health |= {f"{name}_dictionary/{key}": value for key, value in measured.items()}
    return health


def _note_bad_file(bad_files: dict[str, str], path: str, reason: str) -> None:
    if path not in bad_files:
        log.warning("left out: %s: %s", path, reason)
        bad_files[path] = reason


def _check_bad_share(bad_files: dict[str, str], count: int, max_bad_fraction: float) -> None:
    if len(bad_files) > max_bad_fraction * count:
        path, reason = next(iter(bad_files.items()))
        raise RunError(
            "data.max_bad_fraction must be at least the share of files that cannot be trained on, got "
            f"{max_bad_fraction:g} with {len(bad_files)} of {count} files bad, among them {path} ({reason}); raise "
            "--data.max_bad_fraction to train without them, or scan another folder"
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
    """``metrics.jsonl``: one JSON object a step. Rows from ``first_step`` on, left by a killed run, are cut off."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] < first_step else []
                except json.JSONDecodeError:
                    break  # the line that a kill cut in two
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
