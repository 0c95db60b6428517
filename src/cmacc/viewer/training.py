"""Figures of training: learning curves, time per phase, and the health of embeddings and dictionaries."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from cmacc.pretraining import PretrainConfig
from cmacc.viewer.figures import Line, line_panel, smoothed, stack_panel
from cmacc.viewer.page import Figure, Legend
from cmacc.viewer.run_folder import RunFolder, Series

_DIRECTIONS = (("video_to_audio", "c1", "video → audio"), ("audio_to_video", "c2", "audio → video"))
# Phases of a step, by the names of their times in metrics.jsonl.
PHASES = {
    "data": "waiting for data",
    "transform": "transforms",
    "encode": "encoders",
    "keys": "key encoders",
    "select": "selection",
    "refresh": "re-encoding",
    "loss": "loss and gradient",
    "update": "update",
}
# Health metrics of a dictionary: title, and how to read it.
HEALTH = {
    "key_age": (
        "Key age",
        "Mean age of the dictionary's keys in steps. Old keys come from older encoders. The curve should be flat; "
        "lower is fresher.",
    ),
    "pairwise_cosine": (
        "Pairwise cosine",
        "Mean cosine similarity of two keys. Near 0 the keys are spread out; near 1 they are all similar, and the "
        "encoder is collapsing.",
    ),
    "effective_rank": (
        "Effective rank",
        "Number of directions that the keys effectively use, at most the size of the embedding. Higher is more "
        "diverse; a drop towards 1 is collapse.",
    ),
    "distinct_samples": (
        "Distinct samples",
        "Share of keys that come from different clips. Below 100 %, some clips are in the dictionary several times.",
    ),
    "distinct_labels": (
        "Distinct labels",
        "Number of classes among the keys. More is more diverse. Labels are only used for figures, never to train.",
    ),
    "false_negative_share": (
        "False negatives",
        "Share of negatives with the label of the query: the loss separates what belongs together. Lower is better.",
    ),
}
SHARES = ("distinct_samples", "false_negative_share")
_COLOURS = {"audio": "c1", "video": "c2"}


def curves(run: RunFolder) -> list[Figure]:
    """Loss, accuracy, spread of the embeddings, learning rate, speed and time."""
    figures = [_loss_panel(run), _top1_panel(run), _information_panel(run)]
    figures += [_terms_loss_panel(run), _terms_top1_panel(run)]
    # Of other runs, the curves above tell a collapse.
    figures += [_rank_panel(run)] if len(run.config.objective.trained_modalities) == 1 else []
    if series := run.metrics.get("learning_rate"):
        caption = "Learning rate of the optimizer: warm-up, then cosine decay."
        figures.append(Figure("Learning rate", line_panel([Line(series, "c3")], bottom=0.0), caption))
    if series := run.metrics.get("clips_per_second"):
        median = float(np.median(series.values))
        svg = line_panel([Line(series, "c6", smooth=True)], bottom=0.0)
        caption = f"The median is {median:,.1f} clips per second."
        figures.append(Figure("Clips per second", svg, caption))
    figures.append(_phase_panel(run))
    return [figure for figure in figures if figure is not None]


def health(run: RunFolder) -> list[Figure]:
    """Health metrics of the two dictionaries over time; empty if nothing was measured."""
    figures = []
    for name, (title, reading) in HEALTH.items():
        found = {m: run.metrics[f"{m}_dictionary/{name}"] for m in _COLOURS if f"{m}_dictionary/{name}" in run.metrics}
        if found:
            svg = line_panel(
                [Line(series, _COLOURS[modality]) for modality, series in found.items()],
                bottom=None if name == "pairwise_cosine" else 0.0,
                top=1.05 if name == "distinct_samples" else None,
                percent=name in SHARES,
            )
            figures.append(Figure(title, svg, reading, [(_COLOURS[m], f"{m} dictionary", "line") for m in found]))
    return figures


def training_seconds(run: RunFolder) -> float:
    """Time of all steps; 0 if it was not measured."""
    series = run.metrics.get("seconds/step")
    return float(series.values.sum()) if series else 0.0


def final_mean(series: Series) -> float:
    """The running mean at the end of a curve."""
    return float(smoothed(series).values[-1])


def _candidate_count(config: PretrainConfig) -> int:
    """Number of keys that a query is compared with, once the dictionary is full."""
    in_batch = config.optim.batch_size if config.objective.in_batch else 1
    return in_batch + (config.dictionary.size if config.dictionary.selector != "none" else 0)


def _loss_panel(run: RunFolder) -> Figure | None:
    lines, legend = _directions(run, "loss")
    if not lines:
        return None
    count, batch = _candidate_count(run.config), run.config.optim.batch_size
    caption = "Cross entropy in each direction. The run minimises the sum. "
    if run.config.objective.decoupled:
        caption = (
            "The decoupled loss in each direction, without the right key in the denominator. It can be negative. The "
            "run minimises the sum. "
        )
        count, batch = count - 1, batch - 1
    levels = [math.log(count)]
    if run.config.objective.in_batch and count > batch:
        # At this level, the whole dictionary is distinguished from the batch, but nothing within the batch.
        levels.append(math.log(batch))
        caption += (
            f"Dotted: chance among all keys ({levels[0]:.2f}) and among the batch's keys only ({levels[1]:.2f}). A run "
            "that stays at the lower line learns nothing within the batch."
        )
    else:
        caption += f"Dotted: chance ({levels[0]:.2f})."
    return Figure("Loss", line_panel(lines, levels=levels), caption, legend)


def _top1_panel(run: RunFolder) -> Figure | None:
    lines, legend = _directions(run, "top1")
    if not lines:
        return None
    count = _candidate_count(run.config)
    caption = f"How often the right key scores above all negatives, on training clips. Dotted: chance, 1 in {count:,}."
    return Figure("Top-1 accuracy", line_panel(lines, levels=[1 / count], bottom=0.0, percent=True), caption, legend)


def _information_panel(run: RunFolder) -> Figure | None:
    lines, legend = _directions(run, "mutual_information")
    ceilings = run.metrics.get("mutual_information_ceiling")
    if not lines or ceilings is None:
        return None
    found, ceiling = max(final_mean(line.series) for line in lines), final_mean(ceilings)
    caption = (
        f"InfoNCE's estimate, in nats, of the mutual information between video and audio: at the end {found:.2f} of at "
        f"most {ceiling:.2f} ({100 * found / ceiling:.0f} %). Grey: this ceiling, the log of the number of keys. Close "
        "to it, only more negatives could show more. The estimate is a lower bound with random negatives; selected "
        "ones lower it further."
    )
    svg = line_panel([*lines, Line(ceilings, "muted")], bottom=min(0.0, *(float(x.series.values.min()) for x in lines)))
    return Figure("Mutual information", svg, caption, [*legend, ("muted", "ceiling", "line")])


def _terms_loss_panel(run: RunFolder) -> Figure | None:
    """The losses of an objective of other terms than ``cross_modal`` alone."""
    weights = run.config.objective.terms.weights()
    found = {name: series for name in weights if (series := run.metrics.get(f"{name}/loss")) is not None}
    if not found:
        return None
    told = ", ".join(f"{weights[name]:g} for {name}" for name in found)
    caption = f"The loss of each term. The run minimises their sum with the weights {told}."
    if list(weights.values()) == [1.0]:
        caption = "The loss that the run minimises."
    lines, legend = _named_lines(found)
    return Figure("Loss by term", line_panel(lines), caption, legend)


def _terms_top1_panel(run: RunFolder) -> Figure | None:
    terms = run.config.objective.terms.weights()
    of_terms = (name for name in run.metrics if name.endswith("/top1") and name.split("/")[0] in terms)
    found = {name.removesuffix("/top1").replace("/", ", "): run.metrics[name] for name in sorted(of_terms)}
    if not found:
        return None
    batch = run.config.optim.batch_size
    caption = (
        "How often what belongs together scores above all else, on training clips. Dotted: chance among the clips of "
        f"the batch, 1 in {batch:,}."
    )
    lines, legend = _named_lines(found)
    svg = line_panel(lines, levels=[1 / batch], bottom=0.0, percent=True)
    return Figure("Top-1 accuracy by term", svg, caption, legend)


def _rank_panel(run: RunFolder) -> Figure | None:
    (modality,) = run.config.objective.trained_modalities
    series = run.metrics.get(f"{modality}/effective_rank")
    if series is None:
        return None
    config = run.config
    most = min(config.optim.batch_size, config.encoder.embedding_size)
    caption = (
        f"Number of directions that the {modality} embeddings of a batch effectively use, at most {most:,}. A drop "
        "towards 1 is collapse."
    )
    return Figure("Effective rank", line_panel([Line(series, _COLOURS[modality])], bottom=0.0), caption)


def _named_lines(found: dict[str, Series]) -> tuple[list[Line], Legend]:
    colours = itertools.cycle(f"c{number}" for number in range(1, len(PHASES) + 1))
    drawn = list(zip(colours, found.items(), strict=False))
    return [Line(series, c, smooth=True) for c, (_, series) in drawn], [(c, name, "line") for c, (name, _) in drawn]


def _directions(run: RunFolder, name: str) -> tuple[list[Line], Legend]:
    found = [(c, text, series) for d, c, text in _DIRECTIONS if (series := run.metrics.get(f"{d}/{name}")) is not None]
    return [Line(series, c, smooth=True) for c, _, series in found], [(c, text, "line") for c, text, _ in found]


def _phase_panel(run: RunFolder) -> Figure | None:
    whole = run.metrics.get("seconds/step")
    if whole is None:
        return None
    parts: dict[str, NDArray[np.float64]] = {}
    legend: list[tuple[str, str, str]] = []
    for number, (name, text) in enumerate(PHASES.items(), start=1):
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
    caption = f"Time of a step by phase. The longest: {PHASES.get(longest, 'the rest')}, {100 * share:.0f} %."
    svg = stack_panel(whole.steps, parts, [colour for colour, _, _ in legend])
    return Figure("Seconds per step", svg, caption, legend)
