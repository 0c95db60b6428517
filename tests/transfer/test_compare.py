"""Markdown of cards: read back and held against the cards, and what must not stand side by side."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmacc.transfer.beside import beside_published
from cmacc.transfer.card import Card, CardError, DataFacts, Result
from cmacc.transfer.compare import compared, markdown
from cmacc.transfer.published import published_results

from .cards import DATA, RANK, RESULT, WHOLE, card_of, numbers_in, tables_of


def _valued(value: float, low: float, high: float, metric: str = "accuracy") -> Result:
    return dataclasses.replace(RESULT, metric=metric, value=value, low=low, high=high)


def test_the_table_of_a_card_holds_all_its_numbers() -> None:
    other = dataclasses.replace(RESULT, modality="audio", value=0.5, low=0.25, high=0.75, untrained=None)
    card = card_of(RESULT, RANK, other)
    rows = tables_of(markdown(card))[0]
    assert len(rows) == 3
    for row, result in zip(rows, card.results, strict=True):
        scale = 1 if result.metric == "median_rank" else 100
        assert row["task"] == result.task
        assert row["protocol"] == f"{result.protocol}@{result.version}"
        assert (row["modality"], row["metric"]) == (result.modality, result.metric)
        near = pytest.approx([scale * result.value, scale * result.low, scale * result.high], abs=0.0501)
        assert numbers_in(row["value [95 %]"]) == near
        assert ("%" in row["value [95 %]"]) == (scale == 100)
        assert numbers_in(row["chance"]) == pytest.approx([scale * result.chance], abs=0.0501)
        assert row["items"] == f"{result.count}"
        if result.untrained is None:
            assert row["untrained"] == "—"
        else:
            assert numbers_in(row["untrained"]) == pytest.approx([scale * result.untrained], abs=0.0501)
    # By hand: the deviation of 80, 79 and 85 is sqrt((1.333^2 + 2.333^2 + 3.667^2) / 2) = 3.215.
    assert rows[0]["spread over splits"] == "3.2 % over 3"
    assert rows[1]["spread over splits"] == "one split"


def test_the_text_of_a_card_tells_data_recipe_encoder_and_provenance() -> None:
    departing = dataclasses.replace(RESULT, settings=("C=1.0", "epochs=3"))
    text = markdown(card_of(departing))
    _, data, recipes = tables_of(text)
    assert data[0]["present"] == "partial: 792 of 13,320 files, 6 of 101 classes"
    assert data[1]["present"] == "complete: 2,000 files, 50 classes"
    assert (data[0]["path"], data[0]["fingerprint"]) == ("data/ucf101", "f00d")
    assert recipes[0]["windows x crops"] == "10 x 1"
    assert recipes[0]["departures and conditions"] == "C=1.0, epochs=3"
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
    text = markdown(dataclasses.replace(card_of(RESULT), skipped=skipped))
    assert text.count("no picture") == named
    assert ("more." in text) == (more is not None)
    if more:
        assert f"And {more} more." in text


@settings(max_examples=60)
@given(name=st.text(min_size=1), reason=st.text())
def test_no_text_of_a_card_breaks_its_tables(name: str, reason: str) -> None:
    result = dataclasses.replace(RESULT, modality=name, settings=(name, reason))
    card = dataclasses.replace(card_of(result, name=name, kind=name), skipped={name: {name: reason}})
    text = markdown(card)
    text.encode("utf-8")
    (row,) = tables_of(text)[0]
    assert row["modality"] == " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert len(text.splitlines()) == len(markdown(card_of(RESULT)).splitlines())


@pytest.mark.parametrize(
    "bad", ["a|b", "a\nb", "a\r\n\n# b", r"a\|b", "<script>x</script>", "**a**", "[a](http://b)", "`a"]
)
def test_marks_in_texts_are_only_text(bad: str) -> None:
    result = dataclasses.replace(RESULT, modality=bad)
    clean = len(markdown(card_of(RESULT)).splitlines())
    for text in (
        markdown(card_of(result, name=bad)),
        compared([card_of(result), card_of(result)], [bad, "other"]),
        beside_published([card_of(result, kind=bad)], published_results()),
    ):
        assert "<script" not in text
        assert not re.search(r"(?<!\\)\]\(http", text)
        assert "**a**" not in text
        assert not re.search(r"(?<!\\)`", text)
        assert tables_of(text)
    assert len(markdown(card_of(result, name=bad)).splitlines()) == clean
    heading = compared([card_of(result), card_of(result)], [bad, "other"]).splitlines()[0]
    assert heading.count("|") == 8


def test_directions_are_plain_arrows_in_the_text_itself() -> None:
    """People read `card.md` in an editor too, where an HTML escape is only noise."""
    rows = [dataclasses.replace(RANK, modality=name) for name in ("video_to_audio", "audio_to_video")]
    card = card_of(*rows, kind="r3d -> resnet18")
    for text in (markdown(card), compared([card, card], ["a", "b"])):
        assert "| video -> audio |" in text
        assert "| audio -> video |" in text
        assert "&gt;" not in text
    assert "r3d -> resnet18" in markdown(card)


def test_of_seeds_and_of_data_without_classes() -> None:
    two = dataclasses.replace(RESULT, task="fusion", by_split={"seed 0": 0.75, "seed 4": 0.77})
    one = dataclasses.replace(two, modality="audio", by_split={"seed 4": 0.77})
    card = dataclasses.replace(card_of(two, one), data={"fusion": DataFacts("mosi.npz", "f", 2199, 2199, 0, 0)})
    rows, data, _ = tables_of(markdown(card))
    assert [row["spread over seeds"] for row in rows] == ["1.4 % over 2 seeds", "one seed"]
    assert data[0]["present"] == "complete: 2,199 files"
    mixed = tables_of(markdown(card_of(RESULT, two)))[0]
    assert [row["spread over splits"] for row in mixed] == ["3.2 % over 3", "1.4 % over 2 seeds"]


@pytest.mark.parametrize(
    ("metric", "value", "cell", "least"),
    [
        ("mae", 0.5912, "0.591 [0.541, 0.641]", True),
        ("pearson", 0.6944, "0.694 [0.644, 0.744]", False),
        ("gate AUROC", 0.8731, "0.873 [0.823, 0.923]", False),
        ("median_rank", 3.5, "3.5 [3.5, 3.5]", True),
        ("UAR", 0.7, "70.0 % [65.0, 75.0]", False),
        ("acc7", 0.5, "50.0 % [45.0, 55.0]", False),
    ],
)
def test_a_value_has_its_unit_and_the_better_one_is_bold(metric: str, value: float, cell: str, least: bool) -> None:
    about = 0.0 if metric == "median_rank" else 0.05
    own = _valued(value, value - about, value + about, metric)
    assert tables_of(markdown(card_of(own)))[0][0]["value [95 %]"] == cell
    higher = _valued(value + 10 * about + 1, value + 1, value + 2, metric)
    (row, _), *_ = tables_of(compared([card_of(own), card_of(higher)], ["low", "high"]))
    assert [row[name].startswith("**") for name in ("low", "high")] == [least, not least]


def test_a_card_without_results_is_shown() -> None:
    assert "None." in markdown(card_of())


_ELSEWHERE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "protocol version": ({"version": 4}, {}, "3 and 4"),
    "windows": ({"windows": 1}, {}, "10 and 1"),
    "crops": ({"crops": 3}, {}, "1 and 3"),
    "settings": ({"settings": ("C=1",)}, {}, "none and C=1"),
    "fingerprint of the data": ({}, {"fingerprint": "cafe"}, "f00d and cafe"),
    "files present": ({}, {"files": 791}, "792 of 13,320 and 791 of 13,320"),
    "classes present": ({}, {"classes": 7}, "6 of 101 and 7 of 101"),
    "splits or seeds": ({"by_split": {"1": 0.81}}, {}, "1, 2, 3 and 1"),
    "number of items": ({"count": 236}, {}, "237 and 236"),
}


@pytest.mark.parametrize("what", _ELSEWHERE)
@pytest.mark.parametrize("place", [1, 2])
def test_what_was_measured_otherwise_is_refused(what: str, place: int) -> None:
    of_result, of_data, got = _ELSEWHERE[what]
    usual = card_of(RESULT)
    other = dataclasses.replace(
        card_of(dataclasses.replace(RESULT, **of_result)),
        data={**usual.data, "ucf101": dataclasses.replace(DATA, **of_data)},
    )
    cards, names = [usual, usual, usual], ["first", "second", "third"]
    compared(cards, names)
    cards[place] = other
    message = f"cards first and {names[place]}: ucf101, linear, video, accuracy: {what} must be the same.*got {got}$"
    with pytest.raises(CardError, match=message):
        compared(cards, names)


def test_a_row_that_only_one_card_has_may_be_of_anything() -> None:
    audio = dataclasses.replace(RESULT, modality="audio", version=9, windows=2, count=5)
    first, second = tables_of(compared([card_of(RESULT), card_of(RESULT, audio)], ["a", "b"]))[0][::2]
    assert "**" in first["a"]
    assert second["a"] == "—"
    assert second["b"] == "81.3 % [75.5, 86.1]"


@pytest.mark.parametrize(
    ("cards", "names", "message"),
    [
        ([card_of(RESULT)], ["a"], "at least 2 .*got 1"),
        ([], [], "at least 2 .*got 0"),
        ([card_of(RESULT), card_of(RANK)], ["a", "b"], "must share a row.*a ucf101 linear video accuracy; b pairs"),
        ([card_of(), card_of()], ["a", "b"], "must share a row.*a nothing; b nothing"),
        ([card_of(RESULT), card_of(RESULT)], ["a", "a"], "names: must be 2 different ones, got a, a"),
        ([card_of(RESULT), card_of(RESULT)], ["a"], "names: must be 2 different ones"),
        ([card_of(RESULT), card_of(RESULT, RESULT)], ["a", "b"], "card b: .*once, got it twice"),
        (
            [card_of(RESULT), dataclasses.replace(card_of(RESULT), data={"esc50": WHOLE})],
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
    cards = [card_of(_valued(v * scale, lo * scale, hi * scale, metric)) for v, lo, hi in intervals]
    names = [f"n{i}" for i in range(len(cards))]
    text = compared(cards, names)
    row = tables_of(text)[0][0]
    ordered = sorted(values, reverse=metric == "accuracy")
    best = [interval for interval in intervals if interval[0] == ordered[0][0]]
    any_overlap = False
    for name, (value, low, high) in zip(names, intervals, strict=True):
        is_best = value == best[0][0]
        overlaps = not is_best and any(set(range(low, high + 1)) & set(range(b[1], b[2] + 1)) for b in best)
        any_overlap |= overlaps
        assert row[name].startswith("**") == row[name].endswith("**") == is_best
        assert ("≈" in row[name]) == overlaps
        assert numbers_in(row[name]) == [value, low, high]
    assert ("order is not certain" in text) == any_overlap


def test_untrained_values_stand_beneath_and_chance_beside() -> None:
    later = dataclasses.replace(RESULT, untrained=None, value=0.9, low=0.88, high=0.95)
    trained, untrained = tables_of(compared([card_of(RESULT), card_of(later)], ["a", "b"]))[0]
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
    assert len(tables_of(compared([card_of(RANK), card_of(RANK)], ["a", "b"]))[0]) == 1


def test_differences_that_do_not_forbid_are_told_and_nothing_else() -> None:
    usual = card_of(RESULT)
    assert "Differences" not in compared([usual, usual], ["a", "b"])
    other = card_of(RESULT, clip={"frame_count": 32, "frame_height": 112}, pretraining_data=None)
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
