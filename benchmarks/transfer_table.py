"""Writes docs/results.md out of the cards that `transfer.sh` made.

    python benchmarks/transfer_table.py CARDS docs/results.md

A card lies in a folder ``{encoder}-{seed}-{what}``, or ``statistics-{what}``; seeds of one encoder are averaged.
The page's last section is written by hand, and kept.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from cmacc.clips.storage import written_aside
from cmacc.transfer import Card, Result, compared

_TITLES = {
    "esc10": "ESC-10: audio, ten classes, five official folds",
    "ucf101": "UCF101: video only, six of its 101 classes, split 1",
    "finetune": "UCF101: fine-tuning the whole network, the same six classes",
    "pairs-ucf101": "UCF101: video-audio retrieval, the three classes with audio, held-out clips of split 1",
    "digit": "GRID: the spoken digit, held-out clips of one speaker",
    "color": "GRID: the spoken colour, the same clips",
    "pairs-grid": "GRID: video-audio retrieval, held-out clips of one speaker",
}
_BY_HAND = "## How these and earlier results came about"
_NAME = re.compile(r"(?:(?P<encoder>[a-z]+)-(?P<seed>\d+)|statistics)-(?P<what>.+)")
_INTRODUCTION = """# Transfer on real clips

`benchmarks/transfer.sh` writes every number on this page from result cards. The data are in
`../shared/data/real`.

**Encoders.** All are cmacc's small encoders for CPUs (`tiny`).

- *real*: pretrained with `recipes/real.yaml` on GRID's training part, UCF101's training files of
  split 1 in its three classes with audio, assorted clips and 640 rendered clips together.
- *grid*: pretrained with `recipes/grid.yaml` on GRID's training part only.
- *untrained*: the same network with its initial weights.
- *statistics*: mean, deviation and maximum of log-mel bands.

Nothing of ESC-50 and none of the held-out files were trained on.

**Values.** A value is the mean over the seeds of pretraining (± their standard deviation, if there
are several). Brackets hold the mean 95 % interval of a seed: a bootstrap over held-out items or,
where clips were cut from one scene, over scenes. "folds ±" is the standard deviation over folds,
averaged over seeds. Accuracy and recall are in percent. Probes use frozen features, ten windows per
file, one for pairs. `cmacc.transfer.RECIPES` states exactly what is done.
"""


def main(cards: Path, out: Path) -> None:
    """Write the page."""
    found: dict[str, dict[str, list[Card]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(cards.glob("*/card.json")):
        match = _NAME.fullmatch(path.parent.name)
        if match is None:
            raise ValueError(f"{path}: its folder must be named encoder-seed-what or statistics-what")
        found[match["what"]][match["encoder"] or "statistics"].append(Card.read(path))
    parts = [_INTRODUCTION]
    for what, title in _TITLES.items():
        if what in found:
            parts.append(_section(title, found[what]))
    if out.exists() and (kept := out.read_text(encoding="utf-8").partition(_BY_HAND))[1]:
        parts.append(kept[1] + kept[2])
    with written_aside(out) as aside:
        aside.write_text("\n".join(parts), encoding="utf-8")
    print(out)


def _section(title: str, by_encoder: dict[str, list[Card]]) -> str:
    (encoder,) = (name for name in by_encoder if name != "statistics")
    cards, baseline = by_encoder[encoder], by_encoder.get("statistics", [])
    everything = [*cards, *baseline]
    if len(everything) > 1:  # refuses what was not measured alike, on the same data
        compared(everything, [str(number) for number in range(len(everything))])
    lines = [
        f"## {title}\n",
        f"| protocol | modality | metric | chance | statistics | untrained | {encoder} | folds ± | items |",
        "|" + "---|" * 9,
    ]
    for row in cards[0].results:
        rows = [_of(card, row) for card in cards]
        untrained = [r.untrained for r in rows if r.untrained is not None]
        beside = [r for card in baseline if (r := _found(card, row)) is not None]
        spread = f"{_shown(row.metric, mean(r.spread for r in rows))}" if len(row.by_split) > 1 else ""
        low, high = (mean(getattr(r, end) for r in rows) for end in ("low", "high"))
        interval = f"[{_shown(row.metric, low)}, {_shown(row.metric, high)}]"
        cells = [
            f"{row.protocol}@{row.version}",
            row.modality,
            row.metric,
            _shown(row.metric, row.chance),
            _shown(row.metric, beside[0].value) if beside else "",
            _over_seeds(row.metric, untrained),
            f"{_over_seeds(row.metric, [r.value for r in rows])} {interval}",
            spread,
            f"{row.count:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("\n" + _facts(cards))
    return "\n".join(lines) + "\n"


def _facts(cards: list[Card]) -> str:
    (data,) = cards[0].data.values()
    made, clip = cards[0].provenance, cards[0].encoder.clip
    share = f"{data.files:,} of {data.files_listed:,} files"
    if data.classes_listed:
        share += f" of {data.classes} of {data.classes_listed} classes"
    return (
        f"Data {data.fingerprint}, {share}; {len(cards)} seed{'s' if len(cards) > 1 else ''} "
        f"({', '.join(str(card.encoder.seed) for card in cards)}); {clip['frame_count']} frames of "
        f"{clip['frame_height']} x {clip['frame_width']} at {clip['frame_rate_hz']:g} Hz, "
        f"{clip['audio_seconds']:g} s of audio; torch {made.versions['torch'].partition('+')[0]}, "
        f"{made.hardware['device']}."
    )


def _found(card: Card, row: Result) -> Result | None:
    key = (row.task, row.protocol, row.modality, row.metric)
    return next((r for r in card.results if (r.task, r.protocol, r.modality, r.metric) == key), None)


def _of(card: Card, row: Result) -> Result:
    found = _found(card, row)
    if found is None:
        raise ValueError(f"card of {card.encoder.name}: lacks {row.protocol} of {row.modality} on {row.task}")
    return found


def _over_seeds(metric: str, values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {_shown(metric, stdev(values))}" if len(values) > 1 else ""
    return _shown(metric, mean(values)) + spread


def _shown(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric == "median_rank" else f"{100 * value:.1f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
