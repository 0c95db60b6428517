"""How training went: learning curves, where the time goes, and the health of the two dictionaries."""

import math

import numpy as np
from numpy.typing import NDArray

from cmacc.pretraining import PretrainConfig
from cmacc.viewer.figures import Line, line_panel, smoothed, stack_panel
from cmacc.viewer.page import escape, figure, note, section
from cmacc.viewer.run_folder import RunFolder, Series

_DIRECTIONS = (("video_to_audio", "c1", "video → audio"), ("audio_to_video", "c2", "audio → video"))
_PHASES = {
    "data": "waiting for data",
    "transform": "transforms",
    "encode": "encoders",
    "keys": "key encoders",
    "select": "selection",
    "refresh": "re-encoding",
    "loss": "loss and gradient",
    "update": "update",
}
_HEALTH = (
    (
        "key_age",
        "Key age",
        "Mean age of the dictionary's keys in steps. Old keys come from older encoders: flat is good, and the lower "
        "the fresher.",
    ),
    (
        "pairwise_cosine",
        "Pairwise cosine",
        "Mean similarity of two keys. Near 0 they point everywhere; towards 1 all keys are alike and the encoder is "
        "collapsing.",
    ),
    (
        "effective_rank",
        "Effective rank",
        "Directions that the keys really use (at most the embedding's size). Higher is richer; a fall towards 1 is "
        "collapse.",
    ),
    (
        "distinct_samples",
        "Distinct samples",
        "Share of keys that come from different clips. Below 100 % the same clip stands there several times.",
    ),
    (
        "distinct_labels",
        "Distinct labels",
        "How many classes the keys cover (labels are only used to look, never to train). More is more varied.",
    ),
    (
        "false_negative_share",
        "False negatives",
        "Share of negatives that have the query's own label: the loss pushes apart what belongs together. Lower is "
        "better.",
    ),
)


def curves_section(run: RunFolder) -> str:
    """Loss, accuracy, learning rate, speed and time."""
    panels = [_loss_panel(run), _top1_panel(run), _information_panel(run)]
    if series := run.metrics.get("learning_rate"):
        caption = "The step size of the optimiser: warm-up, then half a cosine down."
        panels.append(figure("Learning rate", line_panel([Line(series, "c3")], bottom=0.0), caption))
    if series := run.metrics.get("clips_per_second"):
        median = float(np.median(series.values))
        svg = line_panel([Line(series, "c6", smooth=True)], bottom=0.0)
        panels.append(figure("Clips a second", svg, f"Half of all steps ran faster than {median:,.1f} clips a second."))
    panels.append(_phase_panel(run))
    parts = [
        '<p class="quiet">Faint: every step. Strong: the running mean over a fortieth of the run.</p>',
        '<div class="panels">' + "\n".join(panel for panel in panels if panel) + "</div>",
    ]
    if run.skipped_lines:
        lines = "one line" if run.skipped_lines == 1 else f"{run.skipped_lines} lines"
        parts.append(
            f'<p class="quiet">Skipped: {lines} of metrics.jsonl that could not be read (cut off while written).</p>'
        )
    return section("curves", "Learning curves", *parts)


def health_section(run: RunFolder) -> str:
    """The two dictionaries over time, or a sentence on why there is nothing to show."""
    heading = "Dictionary health"
    if run.config.dictionary.selector == "none":
        text = (
            "This run has no dictionary (<code>selector: none</code>): its negatives are the other clips of the batch."
        )
        return section("health", heading, note(text))
    panels = []
    for name, title, reading in _HEALTH:
        found = [
            (Line(series, colour), (colour, f"{modality} dictionary", "line"))
            for modality, colour in (("audio", "c1"), ("video", "c2"))
            if (series := run.metrics.get(f"{modality}_dictionary/{name}")) is not None
        ]
        if found:
            percent = name in ("distinct_samples", "false_negative_share")
            svg = line_panel(
                [line for line, _ in found],
                bottom=None if name == "pairwise_cosine" else 0.0,
                top=1.05 if name == "distinct_samples" else None,
                percent=percent,
            )
            panels.append(figure(title, svg, reading, [key for _, key in found]))
    if not panels:
        return section(
            "health", heading, note("The dictionaries have not been measured yet; their first keys come with step 1.")
        )
    what = run.config.dictionary
    lead = (
        f"<p>The negatives beyond the batch: {what.size:,} keys of each modality, filled by "
        f"<code>{escape(what.selector)}</code>"
        f"{f' out of a pool of {what.pool_size:,}' if what.selector != 'newest' else ''}, measured every "
        f"{run.config.health_every} steps.</p>"
    )
    absent = [
        t.lower()
        for n, t, _ in _HEALTH[4:]
        if not any(f"{m}_dictionary/{n}" in run.metrics for m in ("audio", "video"))
    ]
    tail = (
        [f'<p class="quiet">No labels are known, so that {" and ".join(absent)} are not shown.</p>'] if absent else []
    )
    return section("health", heading, lead, f'<div class="panels">{"".join(panels)}</div>', *tail)


def training_seconds(run: RunFolder) -> float:
    """Time of all steps, 0 where it was not measured."""
    series = run.metrics.get("seconds/step")
    return float(series.values.sum()) if series else 0.0


def final_mean(series: Series) -> float:
    """The running mean at the end of a curve."""
    return float(smoothed(series).values[-1])


def _candidate_count(config: PretrainConfig) -> int:
    """Among how many keys a query's own stands, once the dictionary is full."""
    in_batch = config.optim.batch_size if config.objective.in_batch else 1
    return in_batch + (config.dictionary.size if config.dictionary.selector != "none" else 0)


def _loss_panel(run: RunFolder) -> str:
    lines, legend = _directions(run, "loss")
    if not lines:
        return ""
    count, batch = _candidate_count(run.config), run.config.optim.batch_size
    levels = [math.log(count)]
    caption = "Cross entropy each way; the run minimises the sum. "
    if run.config.objective.in_batch and count > batch:
        # At this height the dictionary has been told apart as a whole, and nothing within the batch.
        levels.append(math.log(batch))
        caption += (
            f"Dotted: guessing among all {count:,} keys ({levels[0]:.2f}) and among the {batch:,} of the batch alone "
            f"({levels[1]:.2f}); staying at the lower line is no learning within the batch."
        )
    else:
        caption += f"Dotted: guessing among {count:,} keys ({levels[0]:.2f})."
    return figure("Loss", line_panel(lines, levels=levels), caption, legend)


def _top1_panel(run: RunFolder) -> str:
    lines, legend = _directions(run, "top1")
    if not lines:
        return ""
    count = _candidate_count(run.config)
    caption = f"How often the right key beats all negatives, on training clips. Dotted: chance, 1 in {count:,}."
    return figure("Top-1 accuracy", line_panel(lines, levels=[1 / count], bottom=0.0, percent=True), caption, legend)


def _information_panel(run: RunFolder) -> str:
    lines, legend = _directions(run, "mutual_information")
    ceilings = run.metrics.get("mutual_information_ceiling")
    if not lines or ceilings is None:
        return ""
    found, ceiling = max(final_mean(line.series) for line in lines), final_mean(ceilings)
    caption = (
        f"InfoNCE's estimate, in nats, of what video and audio tell of each other: at the end {found:.2f} of at most "
        f"{ceiling:.2f} ({100 * found / ceiling:.0f} %). Grey: that ceiling, log of the number of keys; near it, only "
        "more negatives could show more. A lower bound with negatives drawn at random; chosen ones make it lower still."
    )
    svg = line_panel([*lines, Line(ceilings, "muted")], bottom=min(0.0, *(float(x.series.values.min()) for x in lines)))
    return figure("Mutual information", svg, caption, [*legend, ("muted", "ceiling", "line")])


def _directions(run: RunFolder, name: str) -> tuple[list[Line], list[tuple[str, str, str]]]:
    found = [(c, text, series) for d, c, text in _DIRECTIONS if (series := run.metrics.get(f"{d}/{name}")) is not None]
    return [Line(series, c, smooth=True) for c, _, series in found], [(c, text, "line") for c, text, _ in found]


def _phase_panel(run: RunFolder) -> str:
    whole = run.metrics.get("seconds/step")
    if whole is None:
        return ""
    parts: dict[str, NDArray[np.float64]] = {}
    legend: list[tuple[str, str, str]] = []
    for number, (name, text) in enumerate(_PHASES.items(), start=1):
        series = run.metrics.get(f"seconds/{name}")
        if series is not None:
            place = np.searchsorted(whole.steps, series.steps)
            known = (place < len(whole.steps)) & np.isin(series.steps, whole.steps)
            parts[name] = np.zeros(len(whole.steps))
            parts[name][place[known]] = series.values[known]
            legend.append((f"c{number}", text, "square"))
    parts["rest"] = np.maximum(0.0, whole.values - sum(parts.values(), np.zeros(len(whole.steps))))
    legend.append(("muted", "the rest", "square"))
    longest, seconds = max(parts.items(), key=lambda item: float(item[1].sum()))
    share = seconds.sum() / max(whole.values.sum(), 1e-9)
    caption = f"Where a step's time goes. Most of it: {_PHASES.get(longest, 'the rest')}, {100 * share:.0f} %."
    svg = stack_panel(whole.steps, parts, [colour for colour, _, _ in legend])
    return figure("Seconds a step", svg, caption, legend)
