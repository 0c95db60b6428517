"""What the heads of `cmacc.heads` reach: the tables of docs/heads.md.

    python benchmarks/heads.py events OUT
    python benchmarks/heads.py fusion OUT --real ../shared/data/real
    python benchmarks/heads.py emotion OUT --real ../shared/data/real --ravdess FOLDER [--encoders 0 1 2]
    python benchmarks/heads.py instruments OUT --notes FOLDER
    python benchmarks/heads.py table OUT [--out benchmarks/results/heads-cpu.json] [--page docs/heads.md]

Each makes cards in ``OUT/cards``, as `cmacc evaluate` does, and ``table`` reads them. What stands is not made again.

``events`` (synthetic): 600 films of `write_localised_world`; encoders pretrained on 1,600 clips of another world with
the same classes.

``fusion``: *planted* sequences, whose target is a product of what two modalities say plus what the third says; *digit*,
real: which digit a speaker of GRID says, from features of picture and sound, ten windows a clip; *parts missing*: a
third of the clips lack the picture, and another third the sound. The encoders of the features are pretrained on GRID's
training clips, without labels.

``emotion`` (real): the audio encoder of face reconstruction, pretrained on GRID's training clips, on RAVDESS. GRID has
no emotion, and one speaker. Fine-tuning the untrained encoder is what the labels alone give.

``instruments`` (real): notes in a folder for each instrument, of which those with 60 notes are used.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_data
from numpy.typing import NDArray

from cmacc.clips import AugmentConfig, ClipSpec, LabelTable, Manifest, list_folders, scan
from cmacc.clips.storage import written_aside
from cmacc.clips.synthetic import WorldConfig, write_localised_world, write_world
from cmacc.encoders import EncoderConfig
from cmacc.heads.emotion import emotion_task
from cmacc.heads.event_recipes import EVENT_RECIPES
from cmacc.heads.event_task import EventOptions, evaluate_events
from cmacc.heads.fusion_task import evaluate_fusion
from cmacc.heads.instrument_files import instruments_task
from cmacc.objectives import Terms
from cmacc.pretraining import DataConfig, ObjectiveConfig, OptimConfig, PretrainConfig, pretrain, start_run
from cmacc.pretraining.features import embed
from cmacc.transfer import Card, EvaluateOptions, Result, evaluate
from cmacc.transfer.open import open_encoder
from cmacc.transfer.tasks import TaskData, TaskName
from objectives import machine, tell

MARKS = ("<!-- table of benchmarks/heads.py -->", "<!-- end of the table of heads.py -->")
CPU = torch.device("cpu")
FILMS, CLIPS, CLASSES = 600, 1600, 8
LIGHT = AugmentConfig(
    min_crop_area=0.8, brightness=0.2, contrast=0.2, saturation=0.2, time_mask=0.0, frequency_mask=0.0
)  # fmt: skip
# As in recipes/grid.yaml: the signal is a mouth, which strong augmentation would hide.
MOUTH = AugmentConfig(
    min_crop_area=1.0, max_aspect_change=1.0, flip_probability=0.0, grey_probability=1.0, brightness=0.2,
    contrast=0.2, gain_db=3.0, time_mask=0.0, frequency_mask=0.0,
)  # fmt: skip
EVENTS = PretrainConfig(
    # Of one second: the windows of a film are then its seconds.
    data=DataConfig(clip=ClipSpec(8, 8.0, 32, 32, audio_seconds=1.0), augment=LIGHT),
    encoder=EncoderConfig(mel_bins=32),
    optim=OptimConfig(batch_size=32, steps=600),
)
DIGIT = PretrainConfig(
    data=DataConfig(clip=ClipSpec(10, 10.0, 32, 40, audio_seconds=1.0), augment=MOUTH),
    encoder=EncoderConfig(mel_bins=32),
    optim=OptimConfig(batch_size=32, steps=500),
)
FACE = PretrainConfig(
    data=DataConfig(clip=ClipSpec(10, 5.0, 32, 40, audio_seconds=2.0), augment=MOUTH),
    # Not the audio encoder `small`: a probe in six folds on its 7,680 features takes twenty minutes.
    encoder=EncoderConfig(mel_bins=32),
    optim=OptimConfig(batch_size=32, steps=600),
)
FACE_NAME = "face + masked audio"
FACES = {FACE_NAME: {"face": 1.0, "masked_audio": 1.0}, "masked audio": {"masked_audio": 1.0}}
FINETUNE_EPOCHS = 10
NOTES = 60
PLANTED_ITEMS, PLANTED_STEPS, PLANTED_WIDTH = 2400, 12, 16
DIGIT_WINDOWS = 10
MISSING_SHARE = 1 / 3


def card_folder(out: Path, *names: str) -> Path | None:
    """Where a card is made; None if it stands."""
    folder = out / "cards" / "_".join(names).replace(" ", "-")
    return None if (folder / "card.json").exists() else folder


def trained(config: PretrainConfig, manifest: Path, run_dir: Path) -> Path:
    """The folder of a run, pretrained."""
    if not (run_dir / "config.yaml").exists():
        start_run(replace(config, data=replace(config.data, manifest=manifest, workers=1)), run_dir)
    pretrain(run_dir)
    return run_dir


def grid_manifest(out: Path, real: Path) -> Path:
    """GRID's clips with their digits, a quarter held out."""
    path = out / "grid" / "grid-digit.parquet"
    if not path.exists():
        labels = LabelTable(real / "grid" / "labels.csv", "digit")
        transfer_data.written(path.parent, path.stem, list_folders([real / "grid" / "clips"], labels), 0.25)
    return path


def events(out: Path) -> None:
    """All heads of event localisation on synthetic films."""
    films, clips = (
        WorldConfig(clip_count=count, class_count=CLASSES, frame_size=48, seed=seed)
        for seed, count in enumerate((FILMS, CLIPS))
    )
    write_localised_world(films, out / "films")
    manifest = out / "clips.parquet"
    if not manifest.exists():
        write_world(clips, out / "clips")
        scan(list_folders([out / "clips"])).manifest.write(manifest)
    run_dir = trained(EVENTS, manifest, out / "runs" / "events")
    if folder := card_folder(out, "events"):
        how = EventOptions(workers=1, cache=out / "cache", with_untrained=False)
        evaluate_events(str(run_dir), out / "films", folder, protocols=tuple(EVENT_RECIPES), options=how)


def planted(count: int, seed: int) -> dict[str, NDArray[Any]]:
    """Sequences of three modalities, and a target y = t a + v.

    Every modality says one normal number, t, a or v, at half of the steps, along a direction of its own; all steps
    have noise. What two modalities say together cannot be had from either.
    """
    rng = np.random.default_rng(seed)
    said = {name: rng.normal(size=count) for name in ("text", "audio", "video")}
    arrays = {}
    for name, values in said.items():
        direction = rng.normal(size=PLANTED_WIDTH) / np.sqrt(PLANTED_WIDTH)
        is_said = rng.random((count, PLANTED_STEPS)) < 0.5
        signal = (values[:, None] * is_said)[..., None] * direction
        noise = rng.normal(size=(count, PLANTED_STEPS, PLANTED_WIDTH)) * 0.3
        arrays[name] = (signal + noise).astype(np.float32)
    # Sentiment is in [-3, 3].
    target = np.clip(said["text"] * said["audio"] + said["video"], -3, 3)
    return {**arrays, "labels": target.astype(np.float32)}


def split_arrays(arrays: dict[str, NDArray[Any]], parts: dict[str, Sequence[int]]) -> dict[str, NDArray[Any]]:
    """The arrays of a file for `read_sequences`."""
    return {f"{split}/{name}": values[list(rows)] for split, rows in parts.items() for name, values in arrays.items()}


def digit_arrays(run_dir: Path, manifest: Manifest) -> tuple[dict[str, NDArray[Any]], dict[str, Sequence[int]]]:
    """Features of picture and sound in ten windows of every clip, its digit, and the splits.

    Every sixth training clip is for validation; test are the clips that pretraining did not see either.
    """
    encoder = open_encoder(str(run_dir), CPU).encoder
    ids = list(range(len(manifest)))
    found = embed(encoder, manifest, ids, ("video", "audio"), windows=DIGIT_WINDOWS, workers=1)
    if found.failures or found.sample_ids.tolist() != ids:
        raise SystemExit(f"digit: clips that do not decode: {found.failures}")
    _, digit = np.unique(manifest.column("label"), return_inverse=True)
    split = manifest.column("split")
    seen = [i for i in ids if split[i] != "test"]
    parts = {
        "train": [i for n, i in enumerate(seen) if n % 6],
        "valid": seen[::6],
        "test": [i for i in ids if split[i] == "test"],
    }
    return {**found.by_modality, "labels": digit.astype(np.int64)}, parts


def without_some(arrays: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    """A third of the items lack the picture, and another third the sound."""
    count = len(arrays["labels"])
    drawn = np.random.default_rng(seed).random(count)
    lacks = {"video": drawn < MISSING_SHARE, "audio": drawn > 1 - MISSING_SHARE}
    lengths = {f"lengths/{name}": np.where(is_gone, 0, DIGIT_WINDOWS) for name, is_gone in lacks.items()}
    return {**arrays, **lengths}


def fusion(out: Path, real: Path) -> None:
    """All fusions on planted and on real sequences, and the real ones with one modality alone."""
    rows = range(PLANTED_ITEMS)
    parts: dict[str, Sequence[int]] = {"train": rows[:1600], "valid": rows[1600:1900], "test": rows[1900:]}
    files = {"planted": split_arrays(planted(PLANTED_ITEMS, 0), parts)}
    manifest = grid_manifest(out, real)
    run_dir = trained(DIGIT, manifest, out / "runs" / "digit")
    if any(card_folder(out, "fusion", name) for name in ("digit", "sound alone", "picture alone", "parts missing")):
        arrays, parts = digit_arrays(run_dir, Manifest.read(manifest))
        files["digit"] = split_arrays(arrays, parts)
        files["parts missing"] = split_arrays(without_some(arrays, 0), parts)
        for name, modality in (("sound alone", "audio"), ("picture alone", "video")):
            files[name] = split_arrays({modality: arrays[modality], "labels": arrays["labels"]}, parts)
    for name, own in files.items():
        if folder := card_folder(out, "fusion", name):
            path = out / f"{name.replace(' ', '-')}.npz"
            with written_aside(path) as aside:
                np.savez(aside, **own)  # type: ignore[arg-type]
            if name.endswith("alone"):
                evaluate_fusion(path, folder, methods=("late",))
            else:
                evaluate_fusion(path, folder)


def emotion(out: Path, real: Path, ravdess: Path, seeds: list[int]) -> None:
    """Log-mel statistics, encoders pretrained on faces and untrained, and the latter trained with the labels."""
    manifest = grid_manifest(out, real)
    cache = out / "cache"
    prepared: dict[TaskName, TaskData] = {"emotion": emotion_task("ravdess", ravdess, journal=cache / "scans")}
    # Ten windows of 2 s, the protocol's, hardly differ in speech of 4 s.
    how = EvaluateOptions(windows=4, workers=1, cache=cache)
    if folder := card_folder(out, "emotion", "statistics"):
        evaluate("statistics", ["emotion"], ravdess, folder, options=how, prepared=prepared)
    for seed in seeds:
        for name, terms in FACES.items():
            config = replace(FACE, objective=ObjectiveConfig(terms=Terms(**{"cross_modal": 0.0, **terms})), seed=seed)
            run_dir = trained(config, manifest, out / "runs" / f"{name} {seed}".replace(" ", "-"))
            if folder := card_folder(out, "emotion", name, str(seed)):
                # Untrained, both are the same encoder.
                own = replace(how, with_untrained=name == FACE_NAME)
                evaluate(str(run_dir), ["emotion"], ravdess, folder, options=own, prepared=prepared)
    if folder := card_folder(out, "emotion", "finetune"):
        run_dir = out / "runs" / f"{FACE_NAME} {seeds[0]}".replace(" ", "-")
        own = replace(how, epochs=FINETUNE_EPOCHS)
        evaluate(str(run_dir), ["emotion"], ravdess, folder, protocols=("finetune",), options=own, prepared=prepared)


def instruments(out: Path, notes: Path) -> None:
    """Log-mel statistics and an encoder of sound and picture, on as many notes of every instrument.

    The encoder has heard rendered sounds alone, in `events`.
    """
    chosen = out / "notes"
    if not chosen.exists():
        for folder in sorted(notes.iterdir()):
            files = sorted(folder.glob("*.mp3")) + sorted(folder.glob("*.wav"))
            if len(files) >= NOTES:
                (chosen / folder.name).mkdir(parents=True)
                for number in np.random.default_rng(0).choice(len(files), NOTES, replace=False):
                    shutil.copy(files[number], chosen / folder.name)
    prepared: dict[TaskName, TaskData] = {"instruments": instruments_task(chosen, journal=out / "cache" / "scans")}
    how = EvaluateOptions(workers=1, cache=out / "cache")
    for name, encoder in (("statistics", "statistics"), ("trained", str(out / "runs" / "events"))):
        if folder := card_folder(out, "instruments", name):
            evaluate(encoder, ["instruments"], chosen, folder, options=how, prepared=prepared)


@dataclass(frozen=True)
class Shown:
    """Cards that are lines of the table, one for each protocol and metric.

    Attributes
    ----------
    task, data
        Words of the table.
    cards
        Pattern of their folders; several cards are encoders of several seeds.
    metrics
        Metrics that are shown.
    head
        Name in place of the protocol's; ``{}`` stands for the protocol.
    """

    task: str
    data: str
    cards: str
    metrics: tuple[str, ...]
    head: str = "{}"


NOTES_NAME = "orchestra's notes (real)"
SHOWN = (
    Shown("`ave`", "synthetic films", "events", ("accuracy", "event AUROC", "gate AUROC")),
    Shown("`fusion`", "planted sequences", "fusion_planted", ("pearson",)),
    Shown("`fusion`", "GRID, digit (real)", "fusion_digit", ("accuracy",)),
    Shown("`fusion`", "GRID, digit (real)", "fusion_sound-alone", ("accuracy",), "sound alone"),
    Shown("`fusion`", "GRID, digit (real)", "fusion_picture-alone", ("accuracy",), "picture alone"),
    Shown("`fusion`", "GRID, digit, parts missing (real)", "fusion_parts-missing", ("accuracy",)),
    Shown("`emotion`", "RAVDESS (real)", "emotion_statistics", ("UAR",), "{}, log-mel statistics"),
    *(
        Shown("`emotion`", "RAVDESS (real)", f"emotion_{name.replace(' ', '-')}_*", ("UAR",), f"{{}}, {name}")
        for name in FACES
    ),
    Shown("`emotion`", "RAVDESS (real)", "emotion_finetune", ("UAR",), f"{{}}, {FACE_NAME}"),
    Shown("`instruments`", NOTES_NAME, "instruments_statistics", ("accuracy", "triplets"), "{}, log-mel statistics"),
    Shown("`instruments`", NOTES_NAME, "instruments_trained", ("accuracy", "triplets"), "{}, of rendered clips"),
)


def key(row: Result) -> tuple[str, str, str]:
    """What a row measured."""
    return row.protocol, row.modality, row.metric


def of_modality(modality: str) -> str:
    """What a row is of, where a protocol has several."""
    return {"audio_joint": ", after the heads", "audio_tower": ", before the projection"}.get(modality, "")


def table(out: Path) -> dict[str, Any]:
    """All figures, by line of the table."""
    lines: list[dict[str, Any]] = []
    for shown in SHOWN:
        cards = [Card.read(path) for path in sorted((out / "cards").glob(f"{shown.cards}/card.json"))]
        for first in cards[0].results if cards else ():
            if first.metric not in shown.metrics:
                continue
            rows = [row for card in cards for row in card.results if key(row) == key(first)]
            values = [row.value for row in rows] if len(rows) > 1 else list(first.by_split.values())
            splits = "encoders" if len(rows) > 1 else "seeds" if "seed 0" in first.by_split else "folds"
            befores = [row.untrained for row in rows if row.untrained is not None]
            lines.append(
                {
                    "task": shown.task,
                    "data": shown.data,
                    "head": shown.head.format(f"`{first.protocol}`") + of_modality(first.modality),
                    "metric": first.metric,
                    "value": statistics.mean(row.value for row in rows),
                    "interval": [statistics.mean(row.low for row in rows), statistics.mean(row.high for row in rows)],
                    "by_split": values,
                    "splits": splits,
                    "untrained": statistics.mean(befores) if befores else None,
                    "chance": first.chance,
                    "items": first.count,
                    "seconds": statistics.mean(row.seconds for row in rows),
                    "settings": first.settings,
                }
            )
    return {"machine": machine(), "lines": lines}


def markdown(report: dict[str, Any]) -> str:
    """A table for each task and data."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in report["lines"]:
        tables.setdefault(f"{line['task']}, {line['data']}", []).append(line)
    return "\n\n".join(f"{title}:\n\n{_table_of(lines)}" for title, lines in tables.items())


def _table_of(lines: list[dict[str, Any]]) -> str:
    beside = [name for name in ("untrained", "chance") if any(line[name] is not None for line in lines)]
    heads = ("head", "metric", "value", "95 %", "mean of", *beside, "s")
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in lines:
        low, high = line["interval"]
        values = line["by_split"]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells = [line["metric"], f"{line['value']:.3f}{spread}", f"{low:.3f} to {high:.3f}"]
        cells.append(f"{len(values)} {line['splits']}" if spread else "")
        cells += ["" if line[name] is None else f"{line[name]:.3f}" for name in beside]
        unbroken = [cell.replace(" ", "&nbsp;") for cell in (*cells, f"{line['seconds']:.0f}")]
        rows.append("| " + " | ".join([line["head"], *unbroken]) + " |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("events", "fusion", "emotion", "instruments", "table"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name in ("fusion", "emotion"):
            command.add_argument("--real", type=Path, required=True)
        if name == "emotion":
            command.add_argument("--ravdess", type=Path, required=True)
            command.add_argument("--encoders", type=int, nargs="+", default=[0, 1, 2])
        if name == "instruments":
            command.add_argument("--notes", type=Path, required=True)
        if name == "table":
            command.add_argument("--out", type=Path)
            command.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.command == "events":
        events(options.folder)
    elif options.command == "fusion":
        fusion(options.folder, options.real)
    elif options.command == "emotion":
        emotion(options.folder, options.real, options.ravdess, options.encoders)
    elif options.command == "instruments":
        instruments(options.folder, options.notes)
    else:
        report = table(options.folder)
        tell(report, markdown(report), options.out, options.page, MARKS)


if __name__ == "__main__":
    main()
