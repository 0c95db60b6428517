"""A run folder: made whole, taken up again only where nothing shifted under it, replaced only as a whole.

It holds ``config.yaml``, ``provenance.json``, ``metrics.jsonl``, ``run.log``, ``tensorboard/`` and ``checkpoints/``;
other commands add results (``card.json``, ``report.html`` ...). All of that is of one run: where a run is replaced, all
of it goes, or a report or a model card would mix two.
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
from cmacc.pretraining.clip_stream import RunError, excluded_line, require_random_batches, usable_files
from cmacc.pretraining.config import PretrainConfig, config_from_plain, read_config, to_plain, write_config
from cmacc.pretraining.provenance import (
    PROVENANCE_FILE,
    Provenance,
    config_hash,
    new_run_id,
    read_provenance,
    write_provenance,
)

log = logging.getLogger("cmacc")

# Of training, and of the commands that measure or show a run.
_TRAINED = ("metrics.jsonl", "checkpoints")
_OF_A_RUN = (
    "config.yaml", PROVENANCE_FILE, *_TRAINED, "tensorboard", "run.log", "card.json", "card.md",
    "embeddings.safetensors", "report.html", "inspect.html",
)  # fmt: skip
# What may change when a run is resumed: nothing of the numbers depends on it.
RESUMABLE = (
    "data.manifest", "data.workers", "data.start_method", "data.max_bad_fraction", "save_every", "keep_every",
    "health_every",
)  # fmt: skip


def require_free(run_dir: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a trained run.

    Raises
    ------
    RunError
        It does, and ``overwrite`` is not set.
    """
    # A config alone is what a start that failed on its input leaves: nothing is lost with it.
    if not overwrite and any((run_dir / name).exists() for name in _TRAINED):
        raise RunError(
            f"run folder {run_dir} already contains a run; resume it with --resume {run_dir} or pass --overwrite to "
            "replace it"
        )


def require_one_process() -> None:
    """Refuse to be one of several processes, which would all train the same run into one folder.

    Raises
    ------
    RunError
        ``WORLD_SIZE``, which ``accelerate launch`` and ``torchrun`` set, is above 1.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise RunError(
            f"training must run in one process, got WORLD_SIZE={processes}; several are not supported yet: start it "
            "without a launcher, or with `accelerate launch --num_processes 1`"
        )


def start_run(config: PretrainConfig, run_dir: Path, *, overwrite: bool = False) -> str:
    """Make a run folder that holds the config, the provenance and nothing else of a run.

    The manifest is read first, and a run that is there is removed only after that: a typo costs nothing.

    Returns
    -------
    str
        How many files are excluded by what the scan found, and why, in a line; empty if none are.

    Raises
    ------
    RunError
        The folder holds a run already and ``overwrite`` is not set; there are too few usable files; or this is one of
        several processes.
    ManifestError
        The manifest cannot be read.
    """
    require_one_process()
    require_random_batches(config)
    require_free(run_dir, overwrite=overwrite)
    manifest = Manifest.read(config.data.manifest)
    usable, excluded = usable_files(manifest, config)
    for path in (run_dir / name for name in _OF_A_RUN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir / "config.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return excluded_line(excluded, len(usable))


def change_on_resume(run_dir: Path, changes: Mapping[str, Any]) -> list[str]:
    """Apply settings that were given along with ``--resume``, and write them into the run's config.

    Parameters
    ----------
    run_dir
        Made by `start_run`.
    changes
        Value by dotted name, such as ``{"data.workers": 4}``.

    Returns
    -------
    list of str
        ``name=value`` of those that changed.

    Raises
    ------
    RunError
        A setting would change that shapes the run's numbers.
    ConfigError
        The run's config cannot be read, or the outcome is none.
    """
    config = read_config(run_dir / "config.yaml")
    plain = to_plain(config)
    applied = []
    for name, value in changes.items():
        *path, last = name.split(".")
        inner: Any = plain
        for part in path:
            inner = inner[part]
        wanted = to_plain(value)
        if inner[last] == wanted:
            continue
        if name not in RESUMABLE:
            raise RunError(
                f"run {run_dir}: {name} must stay {inner[last]} when it is resumed, got {wanted}; start a new run for "
                f"another value (only {', '.join(RESUMABLE)} may change)"
            )
        inner[last] = wanted
        applied.append(f"{name}={wanted}")
    if applied:
        write_config(config_from_plain(plain), run_dir / "config.yaml")
    return applied


def check_provenance(run_dir: Path, config: PretrainConfig, manifest: Manifest) -> Provenance | None:
    """Whether a run may go on: with the data and settings that it began with.

    Other versions of the code or of libraries are logged: they may shift numbers, but corrupt nothing.

    Returns
    -------
    Provenance or None
        The run's; None for one of cmacc 0.1.0, which did not keep it.

    Raises
    ------
    RunError
        The manifest, or a setting that shapes the run, is another one.
    """
    begun = read_provenance(run_dir)
    if begun is None:
        log.warning("run %s does not say which data it began with: the manifest is taken to be the same", run_dir)
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
    """Hash of the settings that the run's numbers depend on, as ``config.yaml`` spells them.

    Of the file, not of the config that is read from it: a later version's new settings, with their defaults, would
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
