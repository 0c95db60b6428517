"""Cards, and Markdown of cards read back."""

import dataclasses
import html
import re
from typing import Any

from cmacc.pretraining import Provenance
from cmacc.transfer.card import Card, DataFacts, EncoderFacts, Result

DATA = DataFacts("data/ucf101", "f00d", 792, 13_320, 6, 101)
AVE = DataFacts("data/ave", "ca7e", 4143, 4143, 28, 28)
WHOLE = DataFacts("data/esc50", "beef", 2000, 2000, 50, 50)
RESULT = Result(
    task="ucf101",
    protocol="linear",
    modality="video",
    metric="accuracy",
    value=0.8126,
    untrained=0.4012,
    chance=0.2,
    count=237,
    version=3,
    windows=10,
    crops=1,
    low=0.7551,
    high=0.8614,
    by_split={"1": 0.80, "2": 0.79, "3": 0.85},
    seconds=12.3,
)
RANK = dataclasses.replace(
    RESULT,
    task="pairs",
    protocol="retrieval",
    modality="video to audio",
    metric="median_rank",
    value=18.5,
    untrained=None,
    chance=100.5,
    low=15.0,
    high=22.0,
    by_split={"test": 18.5},
)


def card_of(*results: Result, **encoder: Any) -> Card:
    return Card(
        encoder=dataclasses.replace(
            EncoderFacts(
                name="runs/a",
                kind="r3d",
                weights="0123456789abcdef",
                checkpoint_step=1200,
                seed=7,
                clip={"frame_count": 16, "frame_height": 112},
                pretraining_data="abcd",
            ),
            **encoder,
        ),
        data={"ucf101": DATA, "pairs": WHOLE, "esc50": WHOLE, "hmdb51": WHOLE, "ave": AVE},
        results=results,
        provenance=Provenance({"torch": "2.11"}, {"device": "cpu"}, "2026-01-02T03:04:05+00:00", 5, "cmacc evaluate"),
    )


def tables_of(text: str) -> list[list[dict[str, str]]]:
    """Every table of a Markdown text as rows by column, read as GitHub reads them."""
    tables = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and set(lines[1]) <= set("|- "):
            cells = [[_shown(cell) for cell in line[1:-1].split("|")] for line in lines]
            assert all(len(row) == len(cells[0]) for row in cells), block
            tables.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:]])
    return tables


def _shown(cell: str) -> str:
    return html.unescape(re.sub(r"\\([\\`*~\[\]_])", r"\1", cell)).strip()


def numbers_in(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.\d+", text)]
