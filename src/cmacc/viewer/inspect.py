"""The negatives under a microscope: which keys a run chose at a few of its steps, beside random ones, as one HTML file.

Nothing of it was logged: the steps are replayed from the run's checkpoints (`cmacc.viewer.replay`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cmacc.clips.storage import written_aside
from cmacc.viewer.inspect_figures import figures_of
from cmacc.viewer.inspect_measures import KEYS, glance_section, table, verdict
from cmacc.viewer.inspect_pictures import KeyPictures, duplicates_part, groups_part, hard_negatives_part
from cmacc.viewer.page import escape, note, page, section
from cmacc.viewer.replay import Selection, SelectionReplay
from cmacc.viewer.run_folder import check_out
from cmacc.viewer.selection import SelectionFacts, hard_negatives, selection_facts

OnStep = Callable[[int, int], None]

_OTHER = {"audio": "video", "video": "audio"}


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
        selections = replay.at(step)
        parts = [f"<p>{text}</p>" for text in _step_remarks(replay, step, selections[0].failures)]
        for number, selection in enumerate(selections):
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
            glance.append((selection, facts, hard_negatives(selection)[1]))
            parts += [f"<p>{verdict(facts)}</p>", table(facts)]
            parts.append(figures_of(selection, facts))
            shown = [part(pictures, selection, facts) for part in (groups_part, hard_negatives_part, duplicates_part)]
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
        glance_section(glance),
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
        f"to {what.pool_size:,} into a dictionary of {what.size:,}: {how}. This page repeats the choice of some steps "
        "from the run's checkpoints, and sets as many keys beside it that were drawn at random."
    )


def _words() -> str:
    words = {
        "key": "an encoded picture or sound of a clip seen some steps ago. In the pool it is a candidate, in the "
        "dictionary a negative: a wrong answer that training tells the right one from",
        "query": "a picture or sound of the batch in training; it asks for the other half of its clip among sounds or "
        "pictures",
        "eligible": "a key of the pool that may be chosen: its sample neither stands in the dictionary nor in the "
        "batch, and it is the newest of its sample (unless repeats are allowed)",
        "assigned to": "the query that a key is most like, its pseudo-label; how sure that is, a softmax over the "
        "batch's queries says",
        "gradient": "how the last layer of the key's encoder would change to make that assignment surer: its gradient "
        "embedding",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in words.items())
    return f"<details><summary>Glossary</summary><dl>{rows}</dl></details>"


def _remarks(replay: SelectionReplay, steps: Sequence[int]) -> list[str]:
    remarks = []
    if len(replay.steps) == 1:
        remarks.append(
            "There is one checkpoint only; a run with <code>--keep_every N</code> keeps more, and this page then "
            "shows how the choice changes."
        )
    if any(replay.trained_elsewhere(step) for step in steps):
        remarks.append(
            "The run was trained on another kind of device than this page was made on "
            f"({escape(replay.device.type)}): rounding may have tipped single picks."
        )
    if replay.config.dictionary.gradient == "feature":
        remarks.append(
            "This run's selector looks at the keys' features (<code>gradient: feature</code>): read “feature” where "
            "this page says “gradient”."
        )
    if replay.config.data.shuffle_pairs:
        remarks.append(
            "A control run: every picture got another clip's sound. Clips are shown here with the sound of their own "
            "file."
        )
    if all(label is None for label in replay.manifest.column("label")):
        remarks.append("No labels are known, so that nothing is said of false negatives by label.")
    return [note(remark) for remark in remarks]


def _step_remarks(replay: SelectionReplay, step: int, failures: dict[int, str]) -> list[str]:
    remarks = []
    if step >= replay.config.optim.steps:
        remarks.append("The run ended before this step: this is what it would have chosen next.")
    if step < (warm := replay.config.dictionary.warmup_steps):
        remarks.append(f"Until step {warm:,} the loss leaves the dictionaries out; they only fill.")
    if failures:
        names = ", ".join(escape(replay.manifest.records[sample_id].name) for sample_id in failures)
        remarks.append(
            f"Of the batch {len(failures):,} could not be decoded and gave way to other files, as in training: "
            f"{names}. If they could be decoded then, the run's choice was another than the one shown."
        )
    return remarks


def _title(selection: Selection) -> str:
    other = KEYS[_OTHER[selection.modality]][:-1]
    return f"{selection.modality.capitalize()} dictionary: {KEYS[selection.modality]} that each {other} is told from"


def _offer(replay: SelectionReplay, selection: Selection) -> str:
    wanted = replay.config.optim.batch_size * replay.config.dictionary.select_every
    eligible, count = int(selection.eligible.sum()), len(selection.chosen)
    text = f"Of {len(selection.pool):,} keys in the pool {eligible:,} were eligible, and {count:,} were chosen"
    text += f" ({wanted:,} were wanted)." if count < wanted else "."
    if count == eligible and count:
        text += " All eligible ones: there was no choice, and every random draw is the same."
    return text
