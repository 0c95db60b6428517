"""Run folders: create them, resume them only if data and settings are unchanged, replace them as a whole.

A run folder holds ``config.yaml``, ``provenance.json``, ``metrics.jsonl``, ``run.log``, ``checkpoints/`` and the files
of the tracker. Other commands add results (``card.json``, ``report.html`` ...). When a run is replaced, all of these
are deleted; otherwise a report or a model card would mix two runs.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from cmacc.clips import Manifest
from cmacc.clips.storage import written_aside
from cmacc.encoders import require_compiler
from cmacc.pretraining.clip_stream import RunError, check_batches, excluded_line, usable_files
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.config_files import config_from_plain, read_config, to_plain, write_config
from cmacc.pretraining.dump import DUMPS_FOLDER
from cmacc.pretraining.fitting import check_towers, fitted_to_towers
from cmacc.pretraining.learner import default_device
from cmacc.pretraining.online import check_online
from cmacc.pretraining.provenance import (
    PROVENANCE_FILE,
    Provenance,
    config_hash,
    new_run_id,
    read_provenance,
    write_provenance,
)
from cmacc.pretraining.tracking import TRACKER_FILES, check_tracker

log = logging.getLogger("cmacc")

# Files of training; and all files of a run, including those of the commands that measure or show it.
_TRAINED = ("metrics.jsonl", "checkpoints")
# The logs of all processes but the first, whose log is `run.log`.
RANK_LOGS = "run-rank-*.log"
# Which files the rows of kept features stand for.
ROWS_FILE = "kept-rows.json"
_OF_A_RUN = (
    "config.yaml", PROVENANCE_FILE, ROWS_FILE, *_TRAINED, *TRACKER_FILES, "run.log", "card.json", "card.md",
    "embeddings.safetensors", "report.html", "inspect.html", DUMPS_FOLDER,
)  # fmt: skip
# Settings that may change when a run is resumed, because no number depends on them, but for rounding.
RESUMABLE = (
    "data.manifest", "data.workers", "data.start_method", "data.max_bad_fraction", "save_every", "keep_every",
    "health_every", "eval_every", "check_ranks_every", "tracker", "max_skipped_steps", "optim.chunk_size",
    "train.checkpoint_activations", "train.compile",
)  # fmt: skip


def require_free(run_dir: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a trained run.

    Raises
    ------
    RunError
        The folder holds a run, and ``overwrite`` is not set.
    """
    # A config alone is left by a start that failed on its input. Replacing it loses nothing.
    if not overwrite and any((run_dir / name).exists() for name in _TRAINED):
        raise RunError(
            f"run folder {run_dir} already contains a run; resume it with --resume {run_dir} or pass --overwrite to "
            "replace it"
        )


def require_one_process() -> None:
    """Refuse to run in several processes: all of them would do the same work in the same folder.

    Raises
    ------
    RunError
        ``WORLD_SIZE``, which ``accelerate launch`` and ``torchrun`` set, is above 1.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise RunError(
            f"this command must run in one process, got WORLD_SIZE={processes}; only `cmacc pretrain` and `cmacc "
            "verify` run in several: start it without a launcher, or with `accelerate launch --num_processes 1`"
        )


def start_run(config: PretrainConfig, run_dir: Path, *, overwrite: bool = False) -> list[str]:
    """Create a run folder with the config and the provenance only. Of several processes, one calls this.

    The manifest is read first, and an existing run is removed only after that, so that a typo loses nothing. Settings
    of ``data.clip`` that have their defaults are set to what towers take.

    Returns
    -------
    list of str
        Lines to show: the settings that towers changed, and how many files are excluded by what the scan found.

    Raises
    ------
    RunError
        The folder holds a run already and ``overwrite`` is not set; there are too few usable files, or too few
        are held out for ``eval_every``.
    ConfigError, TowerError
        A tower cannot be opened, or needs other clips than ``data.clip`` says; the tracker is not installed.
    ManifestError
        The manifest cannot be read.
    """
    check_batches(config)
    check_tracker(config)
    if config.train.compile:
        require_compiler(default_device())
    require_free(run_dir, overwrite=overwrite)
    config, changes = fitted_to_towers(config)
    manifest = Manifest.read(config.data.manifest)
    usable, excluded = usable_files(manifest, config)
    check_online(manifest, config)
    check_towers(config)
    for path in (*(run_dir / name for name in _OF_A_RUN), *run_dir.glob(RANK_LOGS)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir / "config.yaml")
    device = default_device()
    write_provenance(
        Provenance.now(
            device,
            config.seed,
            run_id=new_run_id(),
            data=manifest.fingerprint(),
            config=_shaping_hash(run_dir),
        ),
        run_dir,
    )
    told = [f"set for the towers: {', '.join(changes)}"] if changes else []
    return [*told, line] if (line := excluded_line(excluded, len(usable))) else told


def change_on_resume(run_dir: Path, changes: Mapping[str, Any]) -> list[str]:
    """Apply settings that were given with ``--resume``, and write them to the run's config.

    Parameters
    ----------
    run_dir
        Run folder, from `start_run`.
    changes
        Values by dotted name, such as ``{"data.workers": 4}``.

    Returns
    -------
    list of str
        ``name=value`` of the settings that changed.

    Raises
    ------
    RunError
        A setting that the run's results depend on would change.
    ConfigError
        The run's config cannot be read, or the resulting one is invalid; the tracker is not installed.
    """
    file = run_dir / "config.yaml"
    plain = to_plain(read_config(file))
    # Only what is given changes: settings that are newer than the run would change the hash of its config.
    written: dict[str, Any] = yaml.safe_load(file.read_text())
    applied = []
    for name, value in changes.items():
        *path, last = name.split(".")
        inner: Any = plain
        for part in path:
            inner = inner[part]
        wanted = str(value.absolute()) if isinstance(value, Path) else to_plain(value)
        if inner[last] == wanted:
            continue
        if name not in RESUMABLE:
            raise RunError(
                f"run {run_dir}: {name} must stay {inner[last]} when it is resumed, got {wanted}; start a new run for "
                f"another value (only {', '.join(RESUMABLE)} may change)"
            )
        inner[last] = wanted
        outer = written
        for part in path:
            outer = outer.setdefault(part, {})
        outer[last] = wanted
        applied.append(f"{name}={wanted}")
    if applied:
        check_tracker(config_from_plain(plain))
        with written_aside(file) as aside:
            aside.write_text(yaml.safe_dump(written, sort_keys=False))
    return applied


def check_provenance(run_dir: Path, config: PretrainConfig, manifest: Manifest) -> Provenance | None:
    """Check that a run resumes with the data and settings that it began with.

    Other versions of the code or of libraries are only logged: they may change numbers, but corrupt nothing.

    Returns
    -------
    Provenance or None
        The provenance of the run; None for runs of cmacc 0.1.0, which did not record it.

    Raises
    ------
    RunError
        The manifest has changed, or a setting that the run's results depend on.
    """
    begun = read_provenance(run_dir)
    if begun is None:
        log.warning("run %s does not record which data it began with: assuming that the manifest is the same", run_dir)
        return None
    now = Provenance.now(torch.device("cpu"), config.seed, data=manifest.fingerprint(), config=_shaping_hash(run_dir))
    if begun.data != now.data:
        raise RunError(
            f"manifest {config.data.manifest}: must have fingerprint {begun.data}, with which run {run_dir} began, got "
            f"{now.data}: its files, labels, splits or their order changed, and sample ids with them; restore it, or "
            "start a new run"
        )
    if begun.config != now.config:
        raise RunError(
            f"run {run_dir}: config.yaml must have hash {begun.config}, as when the run began, got {now.config}; undo "
            "the edit, or start a new run"
        )
    for difference in begun.differences(now, ("versions", "code")):
        log.warning("run %s began with %s", run_dir, difference)
    return begun


def _shaping_hash(run_dir: Path) -> str:
    """Hash of the settings that the run's results depend on, as written in ``config.yaml``.

    The file is hashed, not the config that is read from it: new settings of a later version, with their defaults, would
    look like an edit.
    """
    plain: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text())
    for name in RESUMABLE:
        *path, last = name.split(".")
        inner = plain
        for part in path:
            inner = inner.get(part, {})
        inner.pop(last, None)
    return config_hash(plain)
