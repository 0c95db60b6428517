"""The published numbers: the file as it is, and what the reader refuses."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from cmacc.transfer.card import CardError
from cmacc.transfer.published import PUBLISHED_TASKS, PublishedResult, parse_published, published_results

_FILE = Path(__file__).parents[2] / "docs" / "published.csv"
_HEADING = "method,backbone,pretraining,ucf101,hmdb51,esc50,ave,protocol,source\n"
_GOOD = 'XDC,R(2+1)D-18,AudioSet,93.0,63.7,,,"finetune; 30 frames of 112 px",README\n'


def test_every_row_of_the_file_is_read_as_it_is() -> None:
    with _FILE.open(encoding="utf-8", newline="") as file:
        plain = list(csv.DictReader(file))
    results = published_results()
    assert len(results) == len(plain) >= 15
    for result, row in zip(results, plain, strict=True):
        for name in ("method", "backbone", "pretraining", "protocol", "source"):
            assert getattr(result, name) == row[name]
        for task in PUBLISHED_TASKS:
            text = row[task]
            assert result.accuracy(task) == (float(text) if text else None)


def test_every_row_of_the_file_has_a_source_and_sensible_numbers() -> None:
    for result in published_results():
        assert result.source.strip()
        assert result.backbone
        assert result.pretraining
        numbers = [n for n in map(result.accuracy, PUBLISHED_TASKS) if n is not None]
        assert numbers
        # Guessing is 1 to 2 %: a share written as 0.93 would be below.
        assert all(10 < n <= 100 for n in numbers)
        # In every paper HMDB51 is the harder one by far: swapped columns, as in one of the sources, show here.
        if result.ucf101 is not None and result.hmdb51 is not None:
            assert result.ucf101 > result.hmdb51 + 15


def test_no_row_of_the_file_is_there_twice() -> None:
    keys = Counter((r.method, r.backbone, r.pretraining, r.kind, r.source) for r in published_results())
    assert [key for key, times in keys.items() if times > 1] == []


def test_the_two_results_of_the_method_itself() -> None:
    of_cmacc = {r.pretraining: (r.ucf101, r.hmdb51, r.kind) for r in published_results() if r.method == "CM-ACC"}
    assert of_cmacc == {"Kinetics": (90.2, 61.8, "finetune"), "AudioSet": (93.5, 67.2, "finetune")}


def test_the_results_on_ave_and_that_none_is_of_the_validation_part() -> None:
    of_ave = [r for r in published_results() if r.ave is not None]
    assert [(r.method, r.ave, r.kind) for r in of_ave] == [
        ("CMBS", 79.3, "cmbs"),
        ("CMBS", 74.2, "cmbs_weak"),
        ("CACE-Net", 80.8, "cace_net"),
    ]
    assert all("best of 200 epochs on test" in r.departures for r in of_ave)
    assert ["M4" in r.departures for r in of_ave] == [False, True, False]
    # A weak result by M4 cannot be above the share of event seconds, which its row states.
    assert all("ceiling=82.2 %" in r.details and r.ave is not None and r.ave < 82.2 for r in of_ave)


def test_details_and_departures_are_read_from_the_protocol() -> None:
    row = _GOOD.replace("finetune; 30 frames of 112 px", "cmbs; leaks=8; departures: one seed, rule M4; second-hand")
    (result,) = parse_published(_HEADING + row)
    assert (result.kind, result.departures) == ("cmbs", "one seed, rule M4")
    assert result.details == ("leaks=8", "departures: one seed, rule M4", "second-hand")
    (bare,) = parse_published(_HEADING + _GOOD.replace("; 30 frames of 112 px", ""))
    assert (bare.details, bare.departures) == ((), "")


def test_kind_and_clip_are_read_from_the_protocol() -> None:
    (result,) = parse_published(_HEADING + _GOOD)
    assert (result.kind, result.clip, result.esc50) == ("finetune", (30, 112), None)
    (unknown,) = parse_published(_HEADING + _GOOD.replace("; 30 frames of 112 px", ""))
    assert (unknown.kind, unknown.clip) == ("finetune", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns must be"),
        (_HEADING.replace("source", "where") + _GOOD, "columns must be method"),
        (_HEADING + _GOOD + _GOOD.replace("README", ""), "line 3: .*source must not be empty"),
        (_HEADING + _GOOD.replace("README", " "), "source must not be empty"),
        (_HEADING + _GOOD.replace("XDC", ""), "method must not be empty"),
        (_HEADING + _GOOD.replace("93.0", "930"), r"ucf101 must be in \[0, 100\], got 930"),
        (_HEADING + _GOOD.replace("63.7", "-1"), r"hmdb51 must be in \[0, 100\]"),
        (_HEADING + _GOOD.replace("63.7", "nan"), r"hmdb51 must be in \[0, 100\], got nan"),
        (_HEADING + _GOOD.replace("63.7", "sixty"), "line 2: .*sixty"),
        (_HEADING + _GOOD.replace(",,,", ",,180,"), r"ave must be in \[0, 100\], got 180"),
        (_HEADING + _GOOD.replace("93.0,63.7", ","), "must have an accuracy"),
        (_HEADING + _GOOD.replace("finetune", "tuned"), "protocol must begin with one of linear"),
        (_HEADING + _GOOD.replace(",README", ""), "must have 9 columns"),
        (_HEADING + _GOOD.replace("README", "README,more"), "must have 9 columns"),
        (_HEADING + _GOOD.replace("README", '"README'), "unexpected end of data"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(CardError, match=message):
        parse_published(text)


def test_an_accuracy_of_another_task_is_no_part_of_it() -> None:
    result = PublishedResult("a", "b", "c", None, None, 80.0, None, "svm", "somewhere")
    assert [result.accuracy(task) for task in PUBLISHED_TASKS] == [None, None, 80.0, None]
