"""The report of a run: one HTML file that needs nothing else, for a laptop or a phone, by day or by night."""

from pathlib import Path

from cmacc.clips.storage import written_aside
from cmacc.viewer.page import duration, escape, page, section, tiles
from cmacc.viewer.results import headline_tiles, results_section
from cmacc.viewer.run_folder import RunFolder, check_out, read_run
from cmacc.viewer.similarity import map_section, queries_section
from cmacc.viewer.training import curves_section, final_mean, health_section, training_seconds

_CONTENTS = (
    ("results", "Results"),
    ("curves", "Learning curves"),
    ("health", "Dictionary health"),
    ("map", "Map"),
    ("queries", "Sample queries"),
    ("origin", "Config and provenance"),
)


def write_report(run_dir: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a run's report. The same run folder gives the same page, byte for byte.

    Parameters
    ----------
    run_dir
        Made by ``cmacc pretrain``; with ``card.json`` and ``embeddings.safetensors`` where it was evaluated.
    out
        The page; ``run_dir/report.html`` by default.
    overwrite
        Whether a file that is there may be replaced.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ReportError
        The folder holds no run or no metrics, a file of it cannot be read, or the page is there already.
    """
    out = out or run_dir / "report.html"
    check_out("report", out, overwrite)
    text = render_report(read_run(run_dir))
    with written_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return out


def render_report(run: RunFolder) -> str:
    """The page as text."""
    name = run.path.resolve().name
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in _CONTENTS)
    body = [
        f'<header><p class="eyebrow">cmacc run</p><h1>{escape(name)}</h1><p class="lead">{_summary(run)}</p></header>',
        _tiles(run),
        f"<nav>{links}</nav>",
        results_section(run),
        curves_section(run),
        health_section(run),
        map_section(run),
        queries_section(run),
        _origin_section(run),
    ]
    return page(f"{name} · cmacc report", "\n".join(body))


def _summary(run: RunFolder) -> str:
    config = run.config
    what = config.dictionary
    negatives = {
        "none": "the other clips of the batch as its only negatives",
        "newest": f"a queue of the {what.size:,} newest keys as negatives",
        "random": f"{what.size:,} negatives drawn at random from a pool of {what.pool_size:,}",
        "hardest": f"the {what.size:,} hardest negatives of a pool of {what.pool_size:,}",
        "active": f"{what.size:,} negatives actively selected from a pool of {what.pool_size:,}",
    }.get(what.selector, f"{what.size:,} negatives by {what.selector}")
    finished = run.step_count >= config.optim.steps
    done = f"{run.step_count:,} steps" if finished else f"{run.step_count:,} of {config.optim.steps:,} steps so far"
    text = f"Trained for {done} on {config.optim.batch_size} clips each, with {negatives}."
    if config.data.shuffle_pairs:
        text += " A control run: every picture got another clip's sound, so that there was nothing to learn."
    loss = run.metrics.get("loss")
    if loss is not None and len(loss.values) > 1:
        text += f" The loss went from {loss.values[0]:.2f} to {final_mean(loss):.2f}."
    if run.card is None:
        text += " Nothing has been evaluated yet."
    elif run.card.encoder.checkpoint_step != run.step_count:
        text += f" The results below are of the checkpoint at step {run.card.encoder.checkpoint_step:,}."
    return escape(text)


def _tiles(run: RunFolder) -> str:
    shown = headline_tiles(run)
    share = 100 * min(1.0, run.step_count / run.config.optim.steps)
    shown.append((f"{run.step_count:,}", "steps", f"{share:.0f} % of {run.config.optim.steps:,}"))
    seconds = training_seconds(run)
    if seconds:
        shown.append((duration(seconds), "of training", f"{run.step_count * run.config.optim.batch_size:,} clips seen"))
    return tiles(shown)


def _origin_section(run: RunFolder) -> str:
    parts = [f"<details><summary>Config</summary><pre>{escape(run.config_text)}</pre></details>"]
    if run.card is not None:
        origin, encoder = run.card.provenance, run.card.encoder
        facts = {
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
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
        parts.append(f"<details><summary>Provenance of the results</summary><dl>{rows}</dl></details>")
    return section("origin", "Config and provenance", *parts)
