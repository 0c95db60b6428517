"""A page of a run's negatives, as one HTML file: keys that the run chose, and batches that it could choose.

A run does not log its negatives. Choices of keys are replayed from the run's checkpoints (`cmacc.viewer.replay`);
batches are formed with the embeddings of the last checkpoint (`cmacc.viewer.inspect_batches`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cmacc.viewer.inspect_batches import inspected_batches
from cmacc.viewer.inspect_figures import map_of_pool, panels_of
from cmacc.viewer.inspect_measures import WORDS, shown_as, verdict
from cmacc.viewer.inspect_pictures import (
    SHOWN,
    Duplicates,
    Group,
    HardNegatives,
    KeyPictures,
    duplicates_of,
    groups_of,
    hard_negatives_of,
)
from cmacc.viewer.page import Figure, check_out, render, write_page
from cmacc.viewer.replay import ReplayError, Selection, SelectionReplay
from cmacc.viewer.selection import SelectionFacts, selection_facts

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Shown:
    """Everything that the page shows of a selection with chosen keys."""

    facts: SelectionFacts
    verdict: str
    panels: list[Figure]
    map: Figure
    groups: list[Group]
    hard_negatives: HardNegatives
    duplicates: Duplicates


def write_inspection(
    run_dir: Path,
    out: Path | None = None,
    *,
    steps: Sequence[int] = (),
    overwrite: bool = False,
    device: torch.device | None = None,
    on_step: OnStep = lambda done, total: None,
) -> Path:
    """Write a page on the negatives that a run chose, and on the batches that it could choose.

    Parameters
    ----------
    run_dir
        Run folder from ``cmacc pretrain``, with at least one checkpoint. Without a dictionary, the page only shows
        batches.
    out
        The page. Default: ``run_dir/inspect.html``.
    steps
        Steps of checkpoints. Default: the last one, and up to three evenly spaced before it.
    overwrite
        Whether to replace an existing file.
    device
        Device to encode on. Default: a GPU if there is one.
    on_step
        Called with (finished steps, all steps).

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ReportError
        The page exists already.
    ReplayError, ConfigError, ManifestError, CheckpointError
        The run has no such checkpoint or trains one modality alone, or a file of it cannot be read.
    """
    out = out or run_dir / "inspect.html"
    check_out("inspect", out, overwrite)
    replay = SelectionReplay(run_dir, device)
    if not replay.config.objective.aligns:
        raise ReplayError(
            f"run {run_dir}: objective.terms must bring video and audio into one space to inspect negatives between "
            f"them, got {', '.join(replay.config.objective.needs)}"
        )
    wanted: Sequence[int] = ()
    if replay.config.dictionary.selector != "none" or steps:
        wanted = sorted(set(steps)) or replay.default_steps()
        for step in wanted:
            replay.check(step)
    return write_page(out, render_inspection(replay, wanted, on_step))


def render_inspection(replay: SelectionReplay, steps: Sequence[int], on_step: OnStep = lambda done, total: None) -> str:
    """The page as text; identical for the same run folder."""
    batches = inspected_batches(replay.run_dir, replay.config, replay.manifest, list(replay.plan.sample_ids))
    pictures = KeyPictures(replay)
    labels_by_id = torch.tensor(replay.manifest.label_indices(), dtype=torch.int64)
    by_step: dict[int, list[tuple[Selection, Shown | None]]] = {}
    for done, step in enumerate(steps):
        on_step(done, len(steps))
        by_step[step] = []
        for number, selection in enumerate(replay.at(step)):
            shown = None
            if len(selection.chosen) > 0:
                generator = torch.Generator().manual_seed(2 * step + number)
                settings = replay.config.objective.temperature, replay.config.dictionary.gradient
                facts = selection_facts(selection, *settings, labels_by_id, generator)
                shown = Shown(
                    facts=facts,
                    verdict=verdict(facts),
                    panels=panels_of(selection, facts),
                    map=map_of_pool(selection, facts),
                    groups=groups_of(pictures, selection, facts),
                    hard_negatives=hard_negatives_of(pictures, selection),
                    duplicates=duplicates_of(pictures, selection),
                )
            by_step[step].append((selection, shown))
    on_step(len(steps), len(steps))
    measured = {name for both in by_step.values() for _, shown in both if shown for name in shown.facts.measures}
    return render(
        "inspect.html.j2",
        name=replay.run_dir.resolve().name,
        config=replay.config,
        device=replay.device.type,
        one_checkpoint=len(replay.steps) == 1,
        trained_elsewhere=any(replay.trained_elsewhere(step) for step in steps),
        labels_known=any(label is not None for label in replay.manifest.column("label")),
        file_names=[record.name for record in replay.manifest.records],
        glance=[(selection, shown) for both in by_step.values() for selection, shown in both if shown],
        words={name: words for name, words in WORDS.items() if name in measured},
        shown_as=shown_as,
        most_shown=SHOWN,
        by_step=by_step,
        batches=batches,
    )
