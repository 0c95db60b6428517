"""Published numbers beside one's own: all of them, with all that differs."""

import dataclasses

import pytest

from cmacc.transfer.beside import beside_published
from cmacc.transfer.card import CardError
from cmacc.transfer.published import PublishedResult, PublishedTask, published_results

from .cards import AVE, RANK, RESULT, card_of, numbers_in, tables_of

_XDC = PublishedResult(
    "XDC", "R(2+1)D-18", "AudioSet", 93.0, 63.7, None, None, "finetune; 32 frames of 224 px", "a README"
)
_CRISSCROSS = PublishedResult("CrissCross", "r3d", "abcd", None, None, 90.5, None, "svm; mean of all folds", "a README")


def test_published_rows_stand_below_ones_own_with_all_that_differs() -> None:
    (rows,) = tables_of(beside_published([card_of(RESULT)], [_XDC, _CRISSCROSS]))
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
        RESULT, task="esc50", protocol="svm", modality="audio", by_split={str(i): 0.8 for i in range(5)}
    )
    odd = dataclasses.replace(alike, by_split={"1": 0.8}, settings=("C=1",), modality="video")
    text = beside_published([card_of(alike)], [_CRISSCROSS])
    assert tables_of(text)[0][1]["differs in"] == "nothing that is known"
    assert "not a comparison" in text
    rows = tables_of(beside_published([card_of(alike), card_of(odd)], [_CRISSCROSS]))[0]
    assert rows[2]["differs in"].split("; ") == [
        "departures and conditions here: C=1 (row 2)",
        "modality: audio there, video here (row 2)",
        "splits: 1 of 5 here (row 2)",
    ]


def test_every_published_number_of_a_task_is_beside_ones_own() -> None:
    tasks: tuple[PublishedTask, ...] = ("ucf101", "esc50", "ave")
    own = [dataclasses.replace(RESULT, task=task) for task in tasks]
    tables = tables_of(beside_published([card_of(*own, RANK)], published_results()))
    assert len(tables) == 3
    for task, rows in zip(tasks, tables, strict=True):
        expected = [n for n in (result.accuracy(task) for result in published_results()) if n is not None]
        assert [numbers_in(row["accuracy"])[0] for row in rows[1:]] == expected
        assert all(row["source"] and row["differs in"] != "nothing that is known" for row in rows[1:])


def test_cards_of_other_tasks_have_nothing_published_beside_them() -> None:
    with pytest.raises(CardError, match=r"accuracy on one of ucf101, hmdb51, esc50, ave .*got pairs"):
        beside_published([card_of(RANK)], published_results())


_EVENTS = dataclasses.replace(
    RESULT,
    task="ave",
    protocol="cmbs",
    modality="both",
    by_split={f"seed {seed}": 0.78 for seed in range(3)},
    settings=("ceiling=82.2 %", "leaks=8"),
)
_OF_AVE = [row for row in published_results() if row.ave is not None]
_FEATURES = {"kind": _OF_AVE[0].backbone, "pretraining_data": _OF_AVE[0].pretraining, "clip": {}}


def _differences(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """By accuracy, the differences of the published rows."""
    return {row["accuracy"]: row["differs in"].split("; ") for row in rows if not row["row"]}


def test_events_measured_like_a_published_row_differ_in_its_departures_alone() -> None:
    text = beside_published([card_of(_EVENTS, **_FEATURES)], published_results())
    (rows,) = tables_of(text)
    assert rows[0]["protocol"] == ("cmbs@3; both; 3 seeds; complete: 4,143 files, 28 classes; ceiling=82.2 %; leaks=8")
    found = _differences(rows)
    chosen = "best of 200 epochs on test, one seed, the released code's"
    assert found["79.3 %"] == [f"departures from cmbs there: {chosen} loss of gates"]
    assert found["80.8 %"] == [
        "protocol: cace_net there, cmbs here",
        f"departures from cace_net there: {chosen} loss of gates",
    ]
    assert found["74.2 %"] == [
        "protocol: cmbs_weak there, cmbs here",
        f"departures from cmbs_weak there: rule M4 (never background), {chosen} gates and loss",
    ]
    assert "epoch that is best on the test part" in text
    assert "UCF101" not in text
    assert "epoch that is best on the test part" not in beside_published([card_of(RESULT)], published_results())


def test_events_of_films_by_ones_own_encoder_differ_in_more() -> None:
    settings = ("window=2 s", *_EVENTS.settings, "training videos without events=0")
    weak = dataclasses.replace(_EVENTS, protocol="cmbs_weak", by_split={"seed 4": 0.7}, settings=settings)
    gates = dataclasses.replace(_EVENTS, metric="gate AUROC")
    part = dataclasses.replace(AVE, files=4000)
    card = dataclasses.replace(card_of(weak, gates), data={"ave": part})
    (rows,) = tables_of(beside_published([card], published_results()))
    assert [row["row"] for row in rows] == ["1", *[""] * len(_OF_AVE)]
    assert "; both; 1 seed; partial: 4,000 of 4,143 files" in rows[0]["protocol"]
    assert _differences(rows)["74.2 %"][1:] == [
        "departures and conditions here: window=2 s, training videos without events=0",
        "data here partial: 4,000 of 4,143 files, 28 of 28 classes",
        f"backbone: {_FEATURES['kind']} there, r3d here",
        f"pretraining: {_FEATURES['pretraining_data']} there, abcd here",
    ]
