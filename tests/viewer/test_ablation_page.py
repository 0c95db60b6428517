"""The page of an ablation: its numbers are the differences', what is missing is said, no name becomes markup."""

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cmacc.ablation import AblationResults, Row, differences_of, plan_from_plain
from cmacc.viewer import ReportError, render_ablation_page, write_ablation_page
from cmacc.viewer.ablation_curves import curve_of
from cmacc.viewer.ablation_figures import Pen, pens, scale_over

EVIL = "<script>alert('x')</script> & $\\frac\""
SECTIONS = ("differences", "results", "curves", "dictionary", "bound", "plateau", "method")
Measure = Callable[[str, str, int, float], dict[str, float]]


class _Page(HTMLParser):
    """Ids, links, tags and tables (rows of cells' text) of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id" and tag == "section":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def measured(regime: str, variant: str, seed: int, share: float) -> dict[str, float]:
    """A run after ``share`` of its steps: one variant is better than the others, and seeds differ."""
    good = 0.2 + 0.3 * share + 0.05 * (variant == "active") + 0.013 * seed * (1 if variant == "active" else 2)
    found = {
        "R@10": good,
        "probe_video": good + 0.1,
        "probe_audio": good + 0.2,
        "median_rank": 90 - 100 * good,
        "plateau_steps": 40.0 + seed - 7 * (variant == "active"),
        "left_plateau": float(variant != "none" or seed != 0),
        "batch_loss": 2.7 - share,
        "mutual_information": 2 * share,
        "mutual_information_ceiling": math.log(16),
    }
    if variant != "none":
        found |= {"distinct_labels": 20.0 + seed, "false_negative_share": 0.1, "key_age": 8.0, "effective_rank": 30.0}
    return found


def made(
    measure: Measure = measured, skipped: tuple[tuple[str, str, str, int], ...] = (), **changes: Any
) -> AblationResults:
    """Results by hand, as `results_of_runs` gives them of runs; ``changes`` are of the plan."""
    plain: dict[str, Any] = {
        "title": "which negatives",
        "problem": {"kind": "vectors", "classes": 20},
        "settings": {"optim": {"batch_size": 16, "steps": 60}},
        "variants": {
            "queue": {"dictionary.selector": "newest"},
            "none": {"dictionary.selector": "none"},
            "active": {"dictionary.selector": "active"},
        },
        "regimes": {"plain": {}, "hot": {"objective.temperature": 0.5}},
        "reference": "queue",
        "seeds": [0, 1, 2],
        "budgets": ["steps", "time"],
    }
    plan = plan_from_plain(plain | changes)
    rows = []
    for cell in plan.cells:
        for budget in plan.budgets:
            for seed in plan.seeds:
                if (cell.regime, cell.variant, budget, seed) in skipped:
                    continue
                for point in (1, 2, 3):
                    step = point * (20 if budget == "steps" else 15)
                    metrics = measure(cell.regime, cell.variant, seed, step / 60)
                    rows += [
                        Row(cell.regime, cell.variant, budget, seed, step, step * 0.02, *item)
                        for item in metrics.items()
                    ]
    return AblationResults(plan, rows, differences_of(rows, plan.reference), len(skipped))


@pytest.fixture(scope="module")
def results() -> AblationResults:
    """Two regimes, three variants, three seeds, two budgets; one run is missing."""
    return made(skipped=(("hot", "active", "time", 2),))


@pytest.fixture(scope="module")
def page(results: AblationResults) -> str:
    return render_ablation_page(results)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL).split())


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def test_sections_and_links(page: str) -> None:
    parsed = _Page(page)
    assert parsed.ids == list(SECTIONS)
    assert [link for link in parsed.links if not link.startswith("#")] == []
    assert {link for link in parsed.links if link.lstrip("#") in SECTIONS} == {f"#{name}" for name in SECTIONS}
    assert not re.search(r"url\(\s*[\"']?http|@import|<script", page)
    shown = text_of(page)
    assert "“none” and “active” compared with “queue”, the reference, in 2 regimes (“plain” and “hot”)" in shown
    assert "1 run of 36 is missing" in shown
    assert "Not shown (no dictionary, or no runs): “none”" in shown
    assert "log 16 = 2.77" in shown
    assert "only with negatives drawn at random" in shown


def test_numbers_are_those_of_the_differences(results: AblationResults, page: str) -> None:
    by_place = {(d.regime, d.budget, d.variant): d for d in results.differences if d.metric == "R@10"}
    budgets = {"same number of steps": "steps", "same time": "time"}
    seen, place = set(), ("", "")
    for cells in _Page(page).tables[0][1:]:
        if len(cells) == 1:
            regime, _, budget = cells[0].partition(" · ")
            place = (regime, budgets[budget])
            continue
        variant, steps, seeds, mean, difference, tally, p, milliseconds = cells
        one = by_place[(*place, variant)]
        seen.add((*place, variant))
        assert number(steps) == one.steps
        assert seeds == (f"{one.seeds}" if one.seeds == 3 else f"{one.seeds} of 3")
        assert [number(part) for part in mean.split(" ± ")] == pytest.approx([one.mean, one.deviation], abs=5.1e-4)
        assert number(milliseconds) == pytest.approx(1000 * one.step_seconds, abs=0.05)
        if variant == "queue":
            assert (difference, tally, p) == ("reference", "–", "–")
        else:
            numbers = [number(part) for part in re.findall(r"[+−]?[\d.]+", difference)]
            assert numbers == pytest.approx([one.difference, one.low, one.high], abs=5.1e-4)
            assert tally == f"{one.wins} : {one.losses}"
            assert float(p) == pytest.approx(one.p_value, rel=5e-3)
    assert seen == set(by_place)


def test_fewer_steps_on_the_plateau_are_better(results: AblationResults, page: str) -> None:
    table = next(t for t in _Page(page).tables if t[0][4] == "difference [95 %]" and t[3][3].startswith("41.0"))
    active = next(row for row in table if row[0] == "active")
    assert active[4].startswith("−7.0")
    assert active[5] == "3 : 0"
    found = render_ablation_page(made(headline="median_rank", regimes={}, budgets=["steps"]))
    assert "← better" in found
    assert "Median rank" in found


def test_the_plateau_table_counts_runs(page: str) -> None:
    table = next(t for t in _Page(page).tables if t[0][-1] == "runs that left it")
    assert [row[2] for row in table if row[0] in ("none", "active")] == ["2 of 3", "3 of 3"] * 2


def test_runs_that_are_not_timed_are_not_planned() -> None:
    found = render_ablation_page(made(lambda *_: {}, regimes={}, timed=["active"]))
    assert "15 runs of 15 planned" in text_of(found)  # three variants for the steps, two for the time, three seeds


def test_one_seed_has_no_intervals() -> None:
    one = made(seeds=[3], budgets=["steps"], regimes={})
    found = render_ablation_page(one)
    assert "nan" not in text_of(found).lower()
    assert "There is only one seed, so there are no intervals." in found
    row = next(row for row in _Page(found).tables[0] if row[0] == "active")
    end = next(d for d in one.differences if (d.variant, d.metric) == ("active", "R@10"))
    assert row[3:5] == [f"{end.mean:.3f}", f"{end.difference:+.3f}"]


def test_names_do_not_become_markup() -> None:
    variants = {EVIL: {"dictionary.selector": "newest"}, f"{EVIL}2": {}}
    evil = made(
        title=EVIL,
        variants=variants,
        regimes={EVIL: {"problem.note": EVIL}, "b": {"problem.note": "b"}, "c": {"problem.note": "c"},
                 f"d{EVIL}": {"problem.note": "d"}},
        reference=EVIL,
        headline="R@10",
        seeds=[0, 1],
        budgets=["steps"],
    )  # fmt: skip
    found = render_ablation_page(evil)
    assert "script" not in _Page(found).tags
    assert "<script" not in found
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; $\\frac&#34;" in found


def test_metrics_that_are_absent_are_said_to_be() -> None:
    few = made(lambda *_: {"R@10": 0.5}, budgets=["steps"], regimes={})
    shown = text_of(render_ablation_page(few))
    for sentence in ("No variant has a dictionary", "No run has an estimate", "Not measured: in these runs"):
        assert sentence in shown
    empty = AblationResults(few.plan, [], [], 9)
    shown = text_of(render_ablation_page(empty))
    assert "9 runs of 9 are missing" in shown
    assert "There is no run to compare yet." in shown


def test_an_unknown_headline_has_no_better_side() -> None:
    found = render_ablation_page(made(lambda *args: {"odd": measured(*args)["R@10"]}, headline="odd", regimes={}))
    assert "better →" not in found
    assert "higher : lower" in found


def test_written_whole_equal_and_not_over_another(tmp_path: Path) -> None:
    results = made(regimes={}, budgets=["steps"])
    page = render_ablation_page(results)
    out = write_ablation_page(results, tmp_path / "ablation.html")
    assert out.read_text(encoding="utf-8") == page
    with pytest.raises(ReportError, match="exists already"):
        write_ablation_page(results, out)
    assert write_ablation_page(results, out, overwrite=True) == out


def test_curves_are_means_over_seeds_where_all_were_measured() -> None:
    rows = [Row("", "a", "steps", seed, step, step / 10 + seed, "m", value)
            for seed, step, value in ((0, 10, 1.0), (1, 10, 3.0), (0, 20, 5.0))]  # fmt: skip
    curve = curve_of(rows, Pen("c1"), seconds=True)
    assert curve is not None
    assert (curve.series.steps.tolist(), curve.series.values.tolist()) == ([1.5], [2.0])
    assert curve.band is not None
    assert [end.tolist() for end in curve.band] == [[1.0], [3.0]]
    assert curve_of([], Pen("c1")) is None


def test_pens_are_all_unlike() -> None:
    names = [f"v{i}" for i in range(20)]
    found = pens(names, "v3")
    assert found["v3"] == Pen("ink")
    assert len(set(found.values())) == 20


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, 0.0], [-3000.0, 1.0], [1e-7]])
def test_scales_hold_zero_and_every_value(values: list[float]) -> None:
    scale = scale_over(values)
    assert all(scale.low < value < scale.high for value in [0.0, *values] if not math.isnan(value))
    assert 2 <= len(scale.ticks) <= 6
