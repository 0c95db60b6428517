"""The negatives under a microscope: which keys a run chose at a few of its steps, beside random ones, as one HTML file.

Nothing of it was logged: the steps are replayed from the run's checkpoints (`cmacc.pretraining.replay`).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cmacc.clips.storage import written_aside
from cmacc.pretraining.replay import Selection, SelectionReplay
from cmacc.pretraining.selection import Measure, SelectionFacts, rivals, selection_facts
from cmacc.viewer.inspect_figures import figures_of
from cmacc.viewer.inspect_pictures import KeyPictures, duplicates_part, groups_part, rivals_part
from cmacc.viewer.page import escape, note, page, section
from cmacc.viewer.run_folder import check_out

OnStep = Callable[[int, int], None]

# Name, what it is called, how it is read, and the format of its values.
_MEASURES = (
    (
        "gradient_norm",
        "Length of the gradient",
        "Long: it is unclear which query of the batch the key belongs to. Such keys teach most.",
        ".3g",
    ),
    (
        "cosine",
        "Likeness of two of its keys",
        "Mean cosine over all pairs: 1 is the same, 0 unrelated. Lower is more varied.",
        ".3f",
    ),
    (
        "key_coverage",
        "Distance from the pool",
        "From an eligible key to the nearest one of the group (1 − cosine), on average. Smaller: the group stands for "
        "more of the pool.",
        ".3f",
    ),
    (
        "gradient_coverage",
        "The same between gradients",
        "Squared distance of gradient embeddings: what active selection tries to make small.",
        ".3g",
    ),
    (
        "queries",
        "Queries served",
        "To how many different queries of the batch the group's keys were assigned.",
        ".1f",
    ),
    (
        "key_age",
        "Age in steps",
        "How long ago the keys were encoded, on average; the encoders have changed since.",
        ".1f",
    ),
    ("distinct_labels", "Different labels", "How many labels the group's samples have.", ".1f"),
    (
        "false_negative_share",
        "Same label as the query",
        "Share of pairs of a query and a key that have one label: false negatives, if labels say what is alike.",
        "%",
    ),
)
_AT_A_GLANCE = ("gradient_norm", "cosine", "key_coverage", "gradient_coverage", "false_negative_share")
_SIGNS = {
    1: ("▲", "above nearly all random draws"),
    -1: ("▼", "below nearly all random draws"),
    0: ("=", "like random"),
}
_OTHER = {"audio": "video", "video": "audio"}
_KEYS = {"audio": "sounds", "video": "pictures"}


def write_inspection(
    run_dir: Path,
    out: Path | None = None,
    *,
    steps: Sequence[int] = (),
    overwrite: bool = False,
    device: torch.device | None = None,
    on_step: OnStep = lambda done, total: None,
) -> Path:
    """Write a page on the negatives that a run chose.

    Parameters
    ----------
    run_dir
        Made by ``cmacc pretrain``, with a dictionary and at least one checkpoint.
    out
        The page; ``run_dir/inspect.html`` by default.
    steps
        Steps of checkpoints; by default the last one's and up to three evenly spaced before it.
    overwrite
        Whether a file that is there may be replaced.
    device
        Where to encode; the default is a GPU where there is one.
    on_step
        Called with (steps done, steps to do).

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ReportError
        The page is there already.
    ReplayError, ConfigError, ManifestError, CheckpointError
        The run has no dictionary, or no such checkpoint; or something of it cannot be read.
    """
    out = out or run_dir / "inspect.html"
    check_out("inspect", out, overwrite)
    replay = SelectionReplay(run_dir, device)
    wanted = sorted(set(steps)) or replay.default_steps()
    for step in wanted:
        replay.check(step)
    text = render_inspection(replay, wanted, on_step)
    with written_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return out


def render_inspection(replay: SelectionReplay, steps: Sequence[int], on_step: OnStep = lambda done, total: None) -> str:
    """The page as text, the same for the same run folder."""
    pictures = KeyPictures(replay)
    labels_by_id = torch.tensor(replay.manifest.label_indices(), dtype=torch.int64)
    sections = []
    glance: list[tuple[Selection, SelectionFacts, float]] = []
    for done, step in enumerate(steps):
        on_step(done, len(steps))
        parts = [f"<p>{text}</p>" for text in _step_remarks(replay, step)]
        for number, selection in enumerate(replay.at(step)):
            parts.append(f'<h3 id="step-{step}-{selection.modality}">{_title(selection)}</h3>')
            parts.append(f"<p>{_offer(replay, selection)}</p>")
            if len(selection.chosen) == 0:
                parts.append(note("Nothing was chosen: no key in the pool was eligible."))
                continue
            generator = torch.Generator().manual_seed(2 * step + number)
            what = replay.config.dictionary
            facts = selection_facts(
                selection, replay.config.objective.temperature, what.gradient, labels_by_id, generator
            )
            glance.append((selection, facts, rivals(selection)[1]))
            parts += [f"<p>{_verdict(facts)}</p>", _table(facts)]
            parts.append(figures_of(selection, facts))
            shown = [part(pictures, selection, facts) for part in (groups_part, rivals_part, duplicates_part)]
            state = " open" if step == steps[-1] else ""
            summary = "Pictures: the chosen keys beside random ones, likely false negatives, duplicates"
            parts.append(f"<details{state}><summary>{summary}</summary>{''.join(shown)}</details>")
        sections.append(section(f"step-{step}", f"Step {step:,}", *parts))
    on_step(len(steps), len(steps))
    name = replay.run_dir.resolve().name
    links = "".join(
        f'<a href="#step-{step}">Step {step:,}</a><a href="#step-{step}-audio">sounds</a>'
        f'<a href="#step-{step}-video">pictures</a>'
        for step in steps
    )
    body = [
        f'<header><p class="eyebrow">cmacc inspect</p><h1>{escape(name)}</h1><p '
        f'class="lead">{_lead(replay)}</p></header>',
        f'<nav><a href="#glance">At a glance</a>{links}</nav>',
        *_remarks(replay, steps),
        _words(),
        _glance(glance),
        *sections,
    ]
    return page(f"{name} · cmacc inspect", "\n".join(body))


def _lead(replay: SelectionReplay) -> str:
    what, batch = replay.config.dictionary, replay.config.optim.batch_size
    how = {
        "active": "those whose gradients are long and unlike each other (k-means++ seeding)",
        "hardest": "those with the longest gradients",
        "random": "any, at random",
        "newest": "the newest",
    }[what.selector]
    often = "At every step" if what.select_every == 1 else f"Every {what.select_every} steps"
    return (
        f"Which negatives did this run choose? {often} it takes {batch * what.select_every:,} keys from a pool of up "
        "to "
        f"{what.pool_size:,} into a dictionary of {what.size:,}: {how}. This page repeats the choice of some steps "
        "from the run's checkpoints, and sets as many keys beside it that were drawn at random."
    )


def _words() -> str:
    words = {
        "key": "an encoded picture or sound of a clip seen some steps ago. In the pool it is a candidate, in the "
        "dictionary "
        "a negative: a wrong answer that training tells the right one from",
        "query": "a picture or sound of the batch in training; it asks for the other half of its clip among sounds or "
        "pictures",
        "eligible": "a key of the pool that may be chosen: its sample neither stands in the dictionary nor in the "
        "batch, "
        "and it is the newest of its sample (unless repeats are allowed)",
        "assigned to": "the query that a key is most like, its pseudo-label; how sure that is, a softmax over the "
        "batch's "
        "queries says",
        "gradient": "how the last layer of the key's encoder would change to make that assignment surer: its gradient "
        "embedding",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in words.items())
    return f"<details><summary>The words on this page</summary><dl>{rows}</dl></details>"


def _remarks(replay: SelectionReplay, steps: Sequence[int]) -> list[str]:
    remarks = []
    if len(replay.steps) == 1:
        remarks.append(
            "There is one checkpoint only; a run with <code>--keep_every N</code> keeps more, and this page then "
            "shows how "
            "the choice changes."
        )
    if any(replay.trained_elsewhere(step) for step in steps):
        remarks.append(
            f"The run was trained on another kind of device than this page was made on ({escape(replay.device.type)}): "
            "rounding may have tipped single picks."
        )
    if replay.config.dictionary.gradient == "feature":
        remarks.append(
            "This run's selector looks at the keys' features (<code>gradient: feature</code>): read “feature” where "
            "this page "
            "says “gradient”."
        )
    if replay.config.data.shuffle_pairs:
        remarks.append(
            "A control run: every picture got another clip's sound. Clips are shown here with the sound of their own "
            "file."
        )
    if all(label is None for label in replay.manifest.column("label")):
        remarks.append("No labels are known, so that nothing is said of false negatives by label.")
    return [note(remark) for remark in remarks]


def _step_remarks(replay: SelectionReplay, step: int) -> list[str]:
    remarks = []
    if step >= replay.config.optim.steps:
        remarks.append("The run ended before this step: this is what it would have chosen next.")
    if step < (warm := replay.config.dictionary.warmup_steps):
        remarks.append(f"Until step {warm:,} the loss leaves the dictionaries out; they only fill.")
    return remarks


def _title(selection: Selection) -> str:
    other = _KEYS[_OTHER[selection.modality]][:-1]
    return f"{selection.modality.capitalize()} dictionary: {_KEYS[selection.modality]} that each {other} is told from"


def _offer(replay: SelectionReplay, selection: Selection) -> str:
    wanted = replay.config.optim.batch_size * replay.config.dictionary.select_every
    eligible, count = int(selection.eligible.sum()), len(selection.chosen)
    text = f"Of {len(selection.pool):,} keys in the pool {eligible:,} were eligible, and {count:,} were chosen"
    text += f" ({wanted:,} were wanted)." if count < wanted else "."
    if count == eligible and count:
        text += " All eligible ones: there was no choice, and every random draw is the same."
    return text


def _verdict(facts: SelectionFacts) -> str:
    """What sets the chosen apart, in a sentence."""
    words = {
        "gradient_norm": ("have longer gradients", "have shorter gradients"),
        "cosine": ("are more alike", "are less alike"),
        "key_coverage": ("leave more of the pool's keys far off", "lie nearer to the pool's keys"),
        "gradient_coverage": ("leave more gradients far off", "lie nearer to the pool's gradients"),
        "queries": ("serve more queries", "serve fewer queries"),
        "key_age": ("are older", "are newer"),
        "distinct_labels": ("have more labels", "have fewer labels"),
        "false_negative_share": ("share the query's label more often", "share the query's label less often"),
    }
    apart = [
        words[name][0 if measure.verdict > 0 else 1] for name, measure in facts.measures.items() if measure.verdict
    ]
    if not apart:
        return "By none of these measures are the chosen keys unlike a random draw."
    listed = apart[0] if len(apart) == 1 else f"{', '.join(apart[:-1])} and {apart[-1]}"
    return f"Compared with random draws the chosen keys {listed}."


def _table(facts: SelectionFacts) -> str:
    rows = []
    for name, title, reading, form in _MEASURES:
        if (measure := facts.measures.get(name)) is None:
            continue
        spread = f"{_shown(measure.low, form)} to {_shown(measure.high, form)}"
        rows.append(
            f'<tr class="new"><td class="reading"><b>{title}</b>{reading}</td>'
            f'<td class="number value" data-name="chosen">{_shown(measure.chosen, form)} {_sign(measure)}</td>'
            f'<td class="number" data-name="random">{_shown(measure.random, form)}<small>{spread}</small></td>'
            f'<td class="number" data-name="all eligible">{_shown(measure.pool, form)}</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th>measured</th><th class="number">chosen</th><th '
        'class="number">random '
        'draws</th><th class="number">all eligible</th></tr></thead><tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
        '<p class="quiet">Random: the mean of 50 draws of as many keys and, small, what nine in ten draws lie between. '
        "▲ and ▼: the chosen lie above or below that; =: a draw might well be like them.</p>"
    )


def _glance(found: Sequence[tuple[Selection, SelectionFacts, float]]) -> str:
    shown = [m for m in _MEASURES if m[0] in _AT_A_GLANCE and any(m[0] in facts.measures for _, facts, _ in found)]
    if not found:
        return section("glance", "At a glance", note("At none of these steps was a key chosen."))
    rows = []
    for selection, facts, rival_share in found:
        cells = []
        for name, title, _, form in shown:
            measure = facts.measures[name]
            cells.append(
                f'<td class="number" data-name="{title.lower()}">{_shown(measure.chosen, form)} {_sign(measure)}'
                f"<small>random {_shown(measure.random, form)}</small></td>"
            )
        rows.append(
            f'<tr class="new"><th scope="row"><a href="#step-{selection.step}-{selection.modality}">step '
            f"{selection.step:,}, {_KEYS[selection.modality]}</a></th>{''.join(cells)}"
            f'<td class="number" data-name="nearer than the right key">{_shown(rival_share, "%")}</td></tr>'
        )
    head = "".join(f'<th class="number">{title.lower()}</th>' for _, title, _, _ in shown)
    return section(
        "glance",
        "At a glance",
        "<p>The chosen keys beside random draws of as many eligible ones (▲ above, ▼ below nearly all draws, = like "
        "a draw). "
        "The last column: in how many of all pairs of a query and a key of the whole dictionary the key, a wrong "
        "answer, "
        "lies nearer than the right one; half, if encoders know nothing.</p>",
        f'<div class="scroll glance"><table><thead><tr><th></th>{head}<th class="number">nearer than the right '
        "key</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _sign(measure: Measure) -> str:
    sign, meaning = _SIGNS[measure.verdict]
    return f'<span class="level" title="{meaning}">{sign}</span>'


def _shown(value: float, form: str) -> str:
    """
    >>> _shown(0.1234, "%"), _shown(3.0, ".1f"), _shown(12345.6, ".3g"), _shown(math.nan, ".3f")
    ('12.3 %', '3.0', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–"
    if form == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if form == ".3g" and abs(value) >= 1000 else f"{value:{form}}"
