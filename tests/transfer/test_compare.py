"""Markdown of cards: read back and held against the cards, and what must not stand side by side."""

import dataclasses
import html
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmacc.pretraining import Provenance
from cmacc.transfer.card import Card, CardError, DataFacts, EncoderFacts, Result
from cmacc.transfer.compare import beside_published, compared, markdown
from cmacc.transfer.published import PublishedResult, published_results

_DATA = DataFacts("data/ucf101", "f00d", 792, 13_320, 6, 101)
_WHOLE = DataFacts("data/esc50", "beef", 2000, 2000, 50, 50)
_RESULT = Result(
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
_RANK = dataclasses.replace(
    _RESULT,
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


def _card(*results: Result, **encoder: Any) -> Card:
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
        data={"ucf101": _DATA, "pairs": _WHOLE, "esc50": _WHOLE, "hmdb51": _WHOLE},
        results=results,
        provenance=Provenance({"torch": "2.11"}, {"device": "cpu"}, "2026-01-02T03:04:05+00:00", 5, "cmacc evaluate"),
    )


def _valued(value: float, low: float, high: float, metric: str = "accuracy") -> Result:
    return dataclasses.replace(_RESULT, metric=metric, value=value, low=low, high=high)


def _tables(text: str) -> list[list[dict[str, str]]]:
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


def _numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.\d+", text)]


def test_the_table_of_a_card_holds_all_its_numbers() -> None:
    other = dataclasses.replace(_RESULT, modality="audio", value=0.5, low=0.25, high=0.75, untrained=None)
    card = _card(_RESULT, _RANK, other)
    rows = _tables(markdown(card))[0]
    assert len(rows) == 3
    for row, result in zip(rows, card.results, strict=True):
        scale = 1 if result.metric == "median_rank" else 100
        assert row["task"] == result.task
        assert row["protocol"] == f"{result.protocol}@{result.version}"
        assert (row["modality"], row["metric"]) == (result.modality, result.metric)
        near = pytest.approx([scale * result.value, scale * result.low, scale * result.high], abs=0.0501)
        assert _numbers(row["value [95 %]"]) == near
        assert ("%" in row["value [95 %]"]) == (scale == 100)
        assert _numbers(row["chance"]) == pytest.approx([scale * result.chance], abs=0.0501)
        assert row["items"] == f"{result.count}"
        if result.untrained is None:
            assert row["untrained"] == "—"
        else:
            assert _numbers(row["untrained"]) == pytest.approx([scale * result.untrained], abs=0.0501)
    # By hand: the deviation of 80, 79 and 85 is sqrt((1.333^2 + 2.333^2 + 3.667^2) / 2) = 3.215.
    assert rows[0]["spread over splits"] == "3.2 % over 3"
    assert rows[1]["spread over splits"] == "one split"


def test_the_text_of_a_card_tells_data_recipe_encoder_and_provenance() -> None:
    departing = dataclasses.replace(_RESULT, settings=("C=1.0", "epochs=3"))
    text = markdown(_card(departing))
    _, data, recipes = _tables(text)
    assert data[0]["present"] == "partial: 792 of 13,320 files, 6 of 101 classes"
    assert data[1]["present"] == "complete: 2,000 files, 50 classes"
    assert (data[0]["path"], data[0]["fingerprint"]) == ("data/ucf101", "f00d")
    assert recipes[0]["windows x crops"] == "10 x 1"
    assert recipes[0]["departures from the recipe"] == "C=1.0, epochs=3"
    for fact in (
        "# Results of runs/a",
        "r3d",
        "0123456789abcdef",
        "1,200",
        "frame_count 16",
        "torch 2.11",
        "device cpu",
        "2026-01-02T03:04:05+00:00",
        "seed: 5",
        "cmacc evaluate",
        "12.3",
    ):
        assert fact in text


@pytest.mark.parametrize(("count", "named", "more"), [(0, 0, None), (20, 20, None), (21, 20, "1"), (1503, 20, "1,483")])
def test_at_most_twenty_files_left_out_are_named(count: int, named: int, more: str | None) -> None:
    skipped = {"esc50": {f"file{i}.mp4": "no picture" for i in range(count)}}
    text = markdown(dataclasses.replace(_card(_RESULT), skipped=skipped))
    assert text.count("no picture") == named
    assert ("more." in text) == (more is not None)
    if more:
        assert f"And {more} more." in text


@settings(max_examples=60)
@given(name=st.text(min_size=1), reason=st.text())
def test_no_text_of_a_card_breaks_its_tables(name: str, reason: str) -> None:
    result = dataclasses.replace(_RESULT, modality=name, settings=(name, reason))
    card = dataclasses.replace(_card(result, name=name, kind=name), skipped={name: {name: reason}})
    text = markdown(card)
    text.encode("utf-8")
    (row,) = _tables(text)[0]
    assert row["modality"] == " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert len(text.splitlines()) == len(markdown(_card(_RESULT)).splitlines())


@pytest.mark.parametrize(
    "bad", ["a|b", "a\nb", "a\r\n\n# b", r"a\|b", "<script>x</script>", "**a**", "[a](http://b)", "`a"]
)
def test_marks_in_texts_are_only_text(bad: str) -> None:
    result = dataclasses.replace(_RESULT, modality=bad)
    clean = len(markdown(_card(_RESULT)).splitlines())
    for text in (
        markdown(_card(result, name=bad)),
        compared([_card(result), _card(result)], [bad, "other"]),
        beside_published([_card(result, kind=bad)], published_results()),
    ):
        assert "<script" not in text
        assert not re.search(r"(?<!\\)\]\(http", text)
        assert "**a**" not in text
        assert not re.search(r"(?<!\\)`", text)
        assert _tables(text)
    assert len(markdown(_card(result, name=bad)).splitlines()) == clean
    heading = compared([_card(result), _card(result)], [bad, "other"]).splitlines()[0]
    assert heading.count("|") == 8


def test_directions_are_plain_arrows_in_the_text_itself() -> None:
    """People read `card.md` in an editor too, where an HTML escape is only noise."""
    rows = [dataclasses.replace(_RANK, modality=name) for name in ("video_to_audio", "audio_to_video")]
    card = _card(*rows, kind="r3d -> resnet18")
    for text in (markdown(card), compared([card, card], ["a", "b"])):
        assert "| video -> audio |" in text
        assert "| audio -> video |" in text
        assert "&gt;" not in text
    assert "r3d -> resnet18" in markdown(card)


def test_a_card_without_results_is_shown() -> None:
    assert "None." in markdown(_card())


_ELSEWHERE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "protocol version": ({"version": 4}, {}, "3 and 4"),
    "windows": ({"windows": 1}, {}, "10 and 1"),
    "crops": ({"crops": 3}, {}, "1 and 3"),
    "settings": ({"settings": ("C=1",)}, {}, "none and C=1"),
    "fingerprint of the data": ({}, {"fingerprint": "cafe"}, "f00d and cafe"),
    "files present": ({}, {"files": 791}, "792 of 13,320 and 791 of 13,320"),
    "classes present": ({}, {"classes": 7}, "6 of 101 and 7 of 101"),
    "splits": ({"by_split": {"1": 0.81}}, {}, "1, 2, 3 and 1"),
    "number of items": ({"count": 236}, {}, "237 and 236"),
}


@pytest.mark.parametrize("what", _ELSEWHERE)
@pytest.mark.parametrize("place", [1, 2])
def test_what_was_measured_otherwise_is_refused(what: str, place: int) -> None:
    of_result, of_data, got = _ELSEWHERE[what]
    usual = _card(_RESULT)
    other = dataclasses.replace(
        _card(dataclasses.replace(_RESULT, **of_result)),
        data={**usual.data, "ucf101": dataclasses.replace(_DATA, **of_data)},
    )
    cards, names = [usual, usual, usual], ["first", "second", "third"]
    compared(cards, names)
    cards[place] = other
    message = f"cards first and {names[place]}: ucf101, linear, video, accuracy: {what} must be the same.*got {got}$"
    with pytest.raises(CardError, match=message):
        compared(cards, names)


def test_a_row_that_only_one_card_has_may_be_of_anything() -> None:
    audio = dataclasses.replace(_RESULT, modality="audio", version=9, windows=2, count=5)
    first, second = _tables(compared([_card(_RESULT), _card(_RESULT, audio)], ["a", "b"]))[0][::2]
    assert "**" in first["a"]
    assert second["a"] == "—"
    assert second["b"] == "81.3 % [75.5, 86.1]"


@pytest.mark.parametrize(
    ("cards", "names", "message"),
    [
        ([_card(_RESULT)], ["a"], "at least 2 .*got 1"),
        ([], [], "at least 2 .*got 0"),
        ([_card(_RESULT), _card(_RANK)], ["a", "b"], "must share a row.*a ucf101 linear video accuracy; b pairs"),
        ([_card(), _card()], ["a", "b"], "must share a row.*a nothing; b nothing"),
        ([_card(_RESULT), _card(_RESULT)], ["a", "a"], "names: must be 2 different ones, got a, a"),
        ([_card(_RESULT), _card(_RESULT)], ["a"], "names: must be 2 different ones"),
        ([_card(_RESULT), _card(_RESULT, _RESULT)], ["a", "b"], "card b: .*once, got it twice"),
        (
            [_card(_RESULT), dataclasses.replace(_card(_RESULT), data={"esc50": _WHOLE})],
            ["a", "b"],
            "card b: must tell the data of ucf101, got esc50",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(cards: list[Card], names: list[str], message: str) -> None:
    with pytest.raises(CardError, match=message):
        compared(cards, names)


@settings(max_examples=100)
@given(
    values=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=4),
    metric=st.sampled_from(["accuracy", "median_rank"]),
)
def test_bold_and_overlap_marks_are_those_of_brute_force(values: list[tuple[int, int, int]], metric: str) -> None:
    scale = 1.0 if metric == "median_rank" else 0.01
    intervals = [(v, v - below, v + above) for v, below, above in values]
    cards = [_card(_valued(v * scale, lo * scale, hi * scale, metric)) for v, lo, hi in intervals]
    names = [f"n{i}" for i in range(len(cards))]
    text = compared(cards, names)
    row = _tables(text)[0][0]
    ordered = sorted(values, reverse=metric == "accuracy")
    best = [interval for interval in intervals if interval[0] == ordered[0][0]]
    any_overlap = False
    for name, (value, low, high) in zip(names, intervals, strict=True):
        is_best = value == best[0][0]
        overlaps = not is_best and any(set(range(low, high + 1)) & set(range(b[1], b[2] + 1)) for b in best)
        any_overlap |= overlaps
        assert row[name].startswith("**") == row[name].endswith("**") == is_best
        assert ("≈" in row[name]) == overlaps
        assert _numbers(row[name]) == [value, low, high]
    assert ("order is not certain" in text) == any_overlap


def test_untrained_values_stand_beneath_and_chance_beside() -> None:
    later = dataclasses.replace(_RESULT, untrained=None, value=0.9, low=0.88, high=0.95)
    trained, untrained = _tables(compared([_card(_RESULT), _card(later)], ["a", "b"]))[0]
    assert trained["chance"] == "20.0 %"
    assert trained == {
        "task": "ucf101",
        "protocol": "linear@3",
        "modality": "video",
        "metric": "accuracy",
        "chance": "20.0 %",
        "a": "81.3 % [75.5, 86.1]",
        "b": "**90.0 % [88.0, 95.0]**",
    }
    assert (untrained["metric"], untrained["a"], untrained["b"]) == ("untrained", "40.1 %", "—")
    assert len(_tables(compared([_card(_RANK), _card(_RANK)], ["a", "b"]))[0]) == 1


def test_differences_that_do_not_forbid_are_told_and_nothing_else() -> None:
    usual = _card(_RESULT)
    assert "Differences" not in compared([usual, usual], ["a", "b"])
    other = _card(_RESULT, clip={"frame_count": 32, "frame_height": 112}, pretraining_data=None)
    other = dataclasses.replace(
        other,
        provenance=dataclasses.replace(
            other.provenance, versions={"torch": "2.12", "av": "18"}, hardware={"device": "H200"}
        ),
    )
    told = [line for line in compared([usual, other], ["a", "b"]).splitlines() if line.startswith("- ")]
    assert [line.replace("\\", "") for line in told] == [
        "- clip frame_count: a 16; b 32",
        "- pretraining data: a abcd; b unknown",
        "- device: a cpu; b H200",
        "- version of torch: a 2.11; b 2.12",
        "- version of av: a not stated; b 18",
    ]


_XDC = PublishedResult("XDC", "R(2+1)D-18", "AudioSet", 93.0, 63.7, None, "finetune; 32 frames of 224 px", "a README")
_CRISSCROSS = PublishedResult("CrissCross", "r3d", "abcd", None, None, 90.5, "svm; mean of all folds", "a README")


def test_published_rows_stand_below_ones_own_with_all_that_differs() -> None:
    (rows,) = _tables(beside_published([_card(_RESULT)], [_XDC, _CRISSCROSS]))
    own, xdc = rows
    assert (own["row"], own["encoder"], own["accuracy"]) == ("1", "runs/a", "81.3 % [75.5, 86.1]")
    assert own["protocol"] == "linear@3; video; 3 of 3 splits; partial: 792 of 13,320 files, 6 of 101 classes"
    assert (xdc["row"], xdc["encoder"], xdc["accuracy"], xdc["source"]) == ("", "XDC", "93.0 %", "a README")
    assert xdc["differs in"].split("; ") == [
        "protocol: finetune there, linear here",
        "data here partial: 792 of 13,320 files, 6 of 101 classes",
        "backbone: R(2+1)D-18 there, r3d here",
        "pretraining: AudioSet there, abcd here",
        "clip: 32 frames of 224 px there, 16 of 112 px here",
    ]


def test_a_published_row_measured_alike_has_no_known_difference_and_each_departure_is_one() -> None:
    alike = dataclasses.replace(
        _RESULT, task="esc50", protocol="svm", modality="audio", by_split={str(i): 0.8 for i in range(5)}
    )
    odd = dataclasses.replace(alike, by_split={"1": 0.8}, settings=("C=1",), modality="video")
    text = beside_published([_card(alike)], [_CRISSCROSS])
    assert _tables(text)[0][1]["differs in"] == "nothing that is known"
    assert "not a comparison" in text
    rows = _tables(beside_published([_card(alike), _card(odd)], [_CRISSCROSS]))[0]
    assert rows[2]["differs in"].split("; ") == [
        "departures from the recipe here: C=1 (row 2)",
        "modality: audio there, video here (row 2)",
        "splits: 1 of 5 here (row 2)",
    ]


def test_every_published_number_of_a_task_is_beside_ones_own() -> None:
    own = [dataclasses.replace(_RESULT, task=task) for task in ("ucf101", "esc50")]
    tables = _tables(beside_published([_card(*own, _RANK)], published_results()))
    assert len(tables) == 2
    for task, rows in zip(("ucf101", "esc50"), tables, strict=True):
        expected = [n for n in (result.accuracy(task) for result in published_results()) if n is not None]
        assert [_numbers(row["accuracy"])[0] for row in rows[1:]] == expected
        assert all(row["source"] and row["differs in"] != "nothing that is known" for row in rows[1:])


def test_cards_of_other_tasks_have_nothing_published_beside_them() -> None:
    with pytest.raises(CardError, match=r"accuracy on one of ucf101, hmdb51, esc50 .*got pairs"):
        beside_published([_card(_RANK)], published_results())
