"""Names, signs and formats of an ablation's metrics, and lookup of its results."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from cmacc.ablation import AblationPlan, AblationResults, Difference, Row
from cmacc.viewer.page import listed

# Name of each metric in plain words, and whether higher is better (1), lower (-1), or neither (0).
_METRICS = {
    "R@1": ("Recall@1", 1),
    "R@10": ("Recall@10", 1),
    "R@1_in_class": ("Recall@1 among clips of the same class", 1),
    "median_rank": ("median rank", -1),
    "probe_video": ("linear probe, video", 1),
    "probe_audio": ("linear probe, audio", 1),
    "balanced_video": ("linear probe, video, mean over classes", 1),
    "balanced_audio": ("linear probe, audio, mean over classes", 1),
    "plateau_steps": ("steps on the plateau", -1),
    "left_plateau": ("share of runs that left the plateau", 1),
    "mutual_information": ("estimate of mutual information, in nats", 0),
    "mutual_information_ceiling": ("ceiling of that estimate, in nats", 0),
    "loss": ("loss", 0),  # not comparable between different numbers of negatives
    "batch_loss": ("in-batch loss", -1),
    "top1": ("top-1 accuracy in training", 0),
    "false_negative_share": ("share of false negatives", -1),
}
BUDGETS = {"steps": "same number of steps", "time": "same time"}
MINUS = "−"


def words(metric: str) -> str:
    """The plain-text name of a metric; an unknown metric keeps its name."""
    return _METRICS.get(metric, (metric, 0))[0]


def direction(metric: str) -> int:
    """1 if higher is better, -1 if lower is, 0 if neither or unknown."""
    return _METRICS.get(metric, (metric, 0))[1]


def digits_for(value: float) -> int:
    """Number of decimals for a value of this size.

    Examples
    --------
    >>> digits_for(0.614), digits_for(42.0), digits_for(-1200.0)
    (3, 1, 0)
    """
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 20 else 3


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign; zero, also after rounding, has none.

    Examples
    --------
    >>> signed(0.0444), signed(-0.5, 1), signed(-0.0001)
    ('+0.044', '−0.5', '0.000')
    """
    text = f"{value:+,.{digits}f}"
    return text[1:] if not any(c in text for c in "123456789") else text.replace("-", MINUS)


def mean_text(one: Difference) -> str:
    """Mean and, with several seeds, standard deviation."""
    digits = digits_for(one.mean)
    deviation = "" if math.isnan(one.deviation) else f" ± {one.deviation:,.{digits}f}"
    return f"{one.mean:,.{digits}f}{deviation}"


def difference_text(one: Difference) -> str:
    """Difference and, with several pairs, its interval; empty if there is no pair."""
    if math.isnan(one.difference):
        return ""
    digits = digits_for(one.mean)
    inside = "" if math.isnan(one.low) else f" [{signed(one.low, digits)}, {signed(one.high, digits)}]"
    return signed(one.difference, digits) + inside


def tally(one: Difference) -> tuple[int, int]:
    """Numbers of pairs in which the variant did better and worse. If lower is better, below counts as better."""
    return (one.losses, one.wins) if direction(one.metric) < 0 else (one.wins, one.losses)


def quoted(names: Sequence[str]) -> str:
    """Names in quotation marks, because they may contain commas or be ordinary words.

    Examples
    --------
    >>> quoted(["none", "active, slow"])
    '“none” and “active, slow”'
    """
    return listed([f"“{name}”" for name in names])


def shared_budget(plan: AblationPlan) -> str:
    """The budget for figures that show only one: equal steps, or else the plan's first."""
    return "steps" if "steps" in plan.budgets else plan.budgets[0]


class Found:
    """Rows and differences of an ablation by regime, variant, budget and metric."""

    def __init__(self, results: AblationResults) -> None:
        self.results, self.plan = results, results.plan
        self._rows: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
        for row in results.rows:
            if math.isfinite(row.value):
                self._rows[row.regime, row.variant, row.budget, row.metric].append(row)
        self._ends = {(d.regime, d.variant, d.budget, d.metric): d for d in results.differences}
        self.metrics = {d.metric for d in results.differences if not math.isnan(d.mean)}

    def rows(self, regime: str, variant: str, budget: str, metric: str) -> list[Row]:
        """All measurements of all seeds."""
        return self._rows.get((regime, variant, budget, metric), [])

    def end(self, regime: str, variant: str, budget: str, metric: str) -> Difference | None:
        """The result at the end of the runs; None if no run has this metric."""
        found = self._ends.get((regime, variant, budget, metric))
        return None if found is None or math.isnan(found.mean) else found


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> flat({"optim": {"steps": 3}, "seed": 0})
    {'optim.steps': 3, 'seed': 0}
    """
    leaves: dict[str, Any] = {}
    for name, value in plain.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return leaves


def capital(text: str) -> str:
    """The text with its first letter capitalised."""
    return text[:1].upper() + text[1:]
