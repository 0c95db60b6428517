"""The report of a run: one self-contained HTML file, for wide and narrow screens, with a light and a dark theme."""

from pathlib import Path

from cmacc.viewer import results
from cmacc.viewer.page import check_out, duration, render, write_page
from cmacc.viewer.run_folder import RunFolder, read_run
from cmacc.viewer.similarity import map_figure, sample_queries
from cmacc.viewer.training import curves, final_mean, health, training_seconds


def write_report(run_dir: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a run's report. The same run folder gives a byte-identical page.

    Parameters
    ----------
    run_dir
        Run folder from ``cmacc pretrain``, with ``card.json`` and ``embeddings.safetensors`` if it was evaluated.
    out
        The page. Default: ``run_dir/report.html``.
    overwrite
        Whether to replace an existing file.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ReportError
        The folder holds no run or no metrics, a file in it cannot be read, or the page exists already.
    """
    out = out or run_dir / "report.html"
    check_out("report", out, overwrite)
    return write_page(out, render_report(read_run(run_dir)))


def render_report(run: RunFolder) -> str:
    """The page as text."""
    return render(
        "report.html.j2",
        name=run.path.resolve().name,
        run=run,
        summary=_summary(run),
        headlines=_tiles(run),
        results=results,
        by_task=results.results_by_task(run),
        curves=curves(run),
        health=health(run),
        labels_known=any(name.endswith(("/distinct_labels", "/false_negative_share")) for name in run.metrics),
        map=map_figure(run),
        queries=sample_queries(run),
        origin=_origin(run),
    )


def _summary(run: RunFolder) -> str:
    config = run.config
    what = config.dictionary
    negatives = {
        "none": "the other clips of the batch as negatives",
        "newest": f"a queue of the {what.size:,} newest keys as negatives",
        "random": f"{what.size:,} negatives drawn at random from a pool of {what.pool_size:,}",
        "hardest": f"the {what.size:,} hardest negatives of a pool of {what.pool_size:,}",
        "active": f"{what.size:,} negatives actively selected from a pool of {what.pool_size:,}",
    }.get(what.selector, f"{what.size:,} negatives by {what.selector}")
    finished = run.step_count >= config.optim.steps
    done = f"{run.step_count:,} steps" if finished else f"{run.step_count:,} of {config.optim.steps:,} steps so far"
    text = f"Trained for {done}, with batches of {config.optim.batch_size} clips and {negatives}."
    terms = config.objective.terms.weights()
    if terms.keys() != {"cross_modal"}:
        text = f"Trained for {done}, with batches of {config.optim.batch_size} clips, by {', '.join(terms)}."
    if len(config.objective.trained_modalities) == 1:
        text += f" Only the {config.objective.trained_modalities[0]} encoder was trained."
    if config.data.shuffle_pairs:
        text += " A control run: every video got the audio of another clip, so that there was nothing to learn."
    loss = run.metrics.get("loss")
    if loss is not None and len(loss.values) > 1:
        text += f" The loss went from {loss.values[0]:.2f} to {final_mean(loss):.2f}."
    if run.card is None:
        text += " Nothing has been evaluated yet."
    elif run.card.encoder.checkpoint_step != run.step_count:
        text += f" The results below are those of the checkpoint at step {run.card.encoder.checkpoint_step:,}."
    return text


def _tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    shown = results.headline_tiles(run)
    share = 100 * min(1.0, run.step_count / run.config.optim.steps)
    shown.append((f"{run.step_count:,}", "steps", f"{share:.0f} % of {run.config.optim.steps:,}"))
    seconds = training_seconds(run)
    if seconds:
        shown.append((duration(seconds), "of training", f"{run.step_count * run.config.optim.batch_size:,} clips seen"))
    return shown


def _origin(run: RunFolder) -> dict[str, object]:
    """Provenance of the results; empty if there are none."""
    if run.card is None:
        return {}
    origin, encoder = run.card.provenance, run.card.encoder
    return {
        "encoder": f"{encoder.name} ({encoder.kind})",
        "weights": encoder.weights,
        "checkpoint": f"step {encoder.checkpoint_step:,}",
        **{
            f"data of {task}": f"{data.path}, {data.files:,} of {data.files_listed:,} files, {data.fingerprint}"
            for task, data in run.card.data.items()
        },
        "seed": origin.seed,
        **{f"version of {name}": value for name, value in origin.versions.items()},
        **origin.hardware,
        "evaluated": origin.created,
    }
