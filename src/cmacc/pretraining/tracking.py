"""Trackers: where the metrics of a run are shown while it trains, besides ``metrics.jsonl``.

A thin layer over the trackers of accelerate. It decides where their files are, that a resumed run goes on in the same
place, and that training never ends because a tracker fails.

=============  ===========================================  ============================================================
tracker        where                                        when a run resumes
=============  ===========================================  ============================================================
`tensorboard`  ``tensorboard/`` in the run folder           steps after the checkpoint are hidden and written again
`mlflow`       ``mlflow.db`` in the run folder (SQLite),    same MLflow run, found by its tag ``cmacc.run_id``; repeated
               or ``MLFLOW_TRACKING_URI``                   steps are there twice
`wandb`        ``wandb/`` in the run folder, and W&B's      same W&B run, whose id is the run's; steps that it has stay
               server unless ``WANDB_MODE=offline``
=============  ===========================================  ============================================================

The names of MLflow experiment and W&B project are ``cmacc``; ``MLFLOW_EXPERIMENT_NAME`` and ``WANDB_PROJECT`` change
them.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

from cmacc.pretraining.config import PretrainConfig, TrackerName
from cmacc.pretraining.config_error import ConfigError
from cmacc.pretraining.config_files import to_plain

log = logging.getLogger("cmacc")

# Their files and folders in a run folder.
TRACKER_FILES = ("tensorboard", "mlflow.db", "mlflow", "wandb")

Log = Callable[[dict[str, float], int], None]

_PROJECT = "cmacc"
_RUN_ID_TAG = "cmacc.run_id"
_DISTRIBUTIONS = {"mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"), "wandb": ("wandb",)}


def check_tracker(config: PretrainConfig) -> None:
    """Check that the tracker's library is installed.

    Raises
    ------
    ConfigError
        It is not.
    """
    for name in _DISTRIBUTIONS.get(config.tracker, ()):
        # Not by import: a folder `wandb` in the working directory, from other runs, imports as an empty package.
        try:
            version(name)
        except PackageNotFoundError as error:
            raise ConfigError(
                f"tracker {config.tracker}: needs the extra `{config.tracker}`: pip install 'cmacc[{config.tracker}]' "
                f"({name} is not installed)"
            ) from error


@contextmanager
def tracked(
    run_dir: Path, config: PretrainConfig, run_id: str, first_step: int, *, is_first: bool = True
) -> Iterator[Log]:
    """Open a tracker for the duration of a run.

    If the tracker fails (its server is gone, a disk is full), this is logged once, and it is not used any more.

    Parameters
    ----------
    run_dir
        Run folder.
    config
        Settings, which name the tracker and are shown beside the metrics.
    run_id
        Id of the run (`Provenance.run_id`), by which a resumed run is recognised.
    first_step
        Step at which this part of the run starts.
    is_first
        Whether this is the first of the run's processes, which tracks.

    Yields
    ------
    callable
        Takes the metrics of a step, by name, and the number of the step. On all processes but the first it does
        nothing.
    """
    tracker = config.tracker
    if tracker == "none" or not is_first:
        yield lambda row, step: None
        return
    guarded = _Guarded(tracker)
    with guarded.failing_once():
        guarded.opened = _OPEN[tracker](run_dir, config, run_id, first_step)
    try:
        yield guarded.log
    finally:
        guarded.close()


@dataclass(frozen=True)
class _Opened:
    """A tracker of any library."""

    log: Log
    close: Callable[[], None]


class _Guarded:
    """A tracker that is not used any more once it failed."""

    def __init__(self, name: TrackerName) -> None:
        self.opened: _Opened | None = None
        self._name = name
        self._failed = False

    def log(self, row: dict[str, float], step: int) -> None:
        if self.opened is not None and not self._failed:
            with self.failing_once():
                self.opened.log(row, step)

    def close(self) -> None:
        if self.opened is not None:
            with self.failing_once():
                self.opened.close()

    @contextmanager
    def failing_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any library, network or disk
            if not self._failed:
                log.warning("tracker %s failed, and is not used any more in this process: %s", self._name, error)
            self._failed = True


def _open_tensorboard(run_dir: Path, config: PretrainConfig, run_id: str, first_step: int) -> _Opened:
    tracker = TensorBoardTracker("tensorboard", str(run_dir), purge_step=first_step)
    print_error = threading.excepthook

    def print_others_error(error: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its error to the next call of the tracker, and Python prints a traceback as well.
        if not type(error.thread).__module__.startswith("tensorboard."):
            print_error(error)

    def close() -> None:
        try:
            tracker.finish()
        finally:
            threading.excepthook = print_error

    threading.excepthook = print_others_error
    tracker.start()
    # As text: with `add_hparams`, TensorBoard shows each start of a run as another run.
    settings = "".join(f"    {name}: {value}\n" for name, value in _flat(to_plain(config)).items())
    tracker.log({"settings": settings}, step=first_step)
    return _Opened(lambda row, step: tracker.log(row, step=step), close)


def _open_mlflow(run_dir: Path, config: PretrainConfig, run_id: str, first_step: int) -> _Opened:
    import mlflow

    is_local = "MLFLOW_TRACKING_URI" not in os.environ
    if is_local:
        mlflow.set_tracking_uri(f"sqlite:///{run_dir.absolute() / 'mlflow.db'}")

    def close() -> None:
        tracker.finish()
        if is_local:  # MLflow sets MLFLOW_TRACKING_URI itself: the next run of this process must not find it
            mlflow.set_tracking_uri(None)

    found = mlflow.search_runs(
        search_all_experiments=True, filter_string=f"tags.`{_RUN_ID_TAG}` = '{run_id}'", output_format="list"
    )
    tracker = MLflowTracker(
        _PROJECT,
        str(run_dir.absolute() / "mlflow") if is_local else None,
        run_id=found[0].info.run_id if found else None,
        run_name=run_dir.name,
        tags={_RUN_ID_TAG: run_id},
    )
    tracker.start()
    if not found:  # MLflow refuses other values of settings that it has
        tracker.store_init_configuration(_flat(to_plain(config)))
    return _Opened(
        lambda row, step: tracker.log({_mlflow_name(name): value for name, value in row.items()}, step=step), close
    )


def _open_wandb(run_dir: Path, config: PretrainConfig, run_id: str, first_step: int) -> _Opened:
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", _PROJECT),
        dir=str(run_dir),
        id=run_id or None,
        name=run_dir.name,
        resume="allow",
    )
    tracker.start()
    tracker.store_init_configuration(_flat(to_plain(config)))
    return _Opened(lambda row, step: tracker.log(row, step=step), tracker.finish)


_OPEN: dict[TrackerName, Callable[[Path, PretrainConfig, str, int], _Opened]] = {
    "tensorboard": _open_tensorboard,
    "mlflow": _open_mlflow,
    "wandb": _open_wandb,
}


def _mlflow_name(name: str) -> str:
    """MLflow allows no ``@`` in the name of a metric: ``R@10`` is ``R_at_10`` there."""
    return name.replace("@", "_at_")


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
