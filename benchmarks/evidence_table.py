"""The tables of docs/evidence.md, out of what `evidence.sh` left.

    python benchmarks/evidence_table.py evidence-out/tables [--out benchmarks/results/evidence-cpu.json]

A plan of one regime: a line a variant with R@10, its paired difference to the reference, the 95 % bootstrap interval
over seeds, wins : losses and the sign test's p, the differences of R@1 (among all, and among the own class) and of both
probes, and the steps to leave the plateau. A plan of several: for R@10 and for R@1 a line a regime with the reference
and the differences of the others, at equal steps and (=t) in equal time. All is measured at the end of the runs.
``--out`` keeps the same as JSON, with the other metrics' means; ``--reference VARIANT`` compares with another one, of
the plans that have it.
"""

import argparse
import dataclasses
import json
import math
import platform
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from cmacc.ablation import Row, differences_of

_TABLED = ("R@10", "R@1", "R@1_in_class", "probe_video", "probe_audio")
_KEPT = (
    *_TABLED, "median_rank", "balanced_video", "balanced_audio", "plateau_steps", "left_plateau",
    "mutual_information", "mutual_information_ceiling", "batch_loss", "key_age", "distinct_labels",
    "false_negative_share", "effective_rank",
)  # fmt: skip


def difference(row: dict[str, Any]) -> str:
    """``+0.012 [-0.003, +0.027]``; empty for the reference."""
    if math.isnan(row["difference"]):
        return ""
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def table(rows: list[dict[str, Any]]) -> str:
    """A line a budget and variant."""
    heads = ["budget", "variant", "steps", "ms per step", "R@10", "minus reference [95 %]", "wins : losses, p",
             "R@1, minus reference", "in class", "probe video", "probe audio", "plateau left after"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (budget, variant), group in groupby(rows, lambda r: (r["budget"], r["variant"])):
        by_metric = {row["metric"]: row for row in group}
        main = by_metric["R@10"]
        others = [difference(by_metric[name]) if name in by_metric else "–" for name in _TABLED[1:]]
        plateau = by_metric.get("plateau_steps")
        has_left = by_metric["left_plateau"]["mean"] if plateau else 1
        shown = "–" if plateau is None else f"{plateau['mean']:.0f}" if has_left == 1 else f"{has_left:.0%} left it"
        cells = [f"equal {budget}", variant, f"{main['steps']:,}", f"{1000 * main['step_seconds']:.1f}",
                 f"{main['mean']:.3f} ± {main['deviation']:.3f}", difference(main), votes(main), *others,
                 shown]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def votes(row: dict[str, Any]) -> str:
    """``4 : 1, 0.38``; empty for the reference."""
    return "" if math.isnan(row["difference"]) else f"{row['wins']} : {row['losses']}, {row['p_value']:.2g}"


def pivot(rows: list[dict[str, Any]], metric: str) -> str:
    """A line a regime."""
    main = [row for row in rows if row["metric"] == metric]
    reference = next(row["variant"] for row in main if math.isnan(row["difference"]))
    columns = list(dict.fromkeys((row["budget"], row["variant"]) for row in main if row["variant"] != reference))
    heads = ["regime", reference, *(f"{variant}{' =t' if budget == 'time' else ''}" for budget, variant in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for regime, group in groupby(main, lambda row: row["regime"]):
        found = {(row["budget"], row["variant"]): row for row in group}
        own = found["steps", reference]
        cells = [regime, f"{own['mean']:.3f} ± {own['deviation']:.3f}"]
        for column in columns:
            row = found.get(column)
            cells.append("–" if row is None else f"{difference(row)} {row['wins']} : {row['losses']}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, help="folder of NAME-differences.parquet")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--reference", help="compare with this variant, instead of with the plan's")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for path in sorted(options.tables.glob("*-differences.parquet")):
        name = path.name.removesuffix("-differences.parquet")
        order: dict[tuple[str, ...], int] = {}
        rows = pq.read_table(path).to_pylist()
        if options.reference:
            measured = [Row(**row) for row in pq.read_table(path.with_name(f"{name}-metrics.parquet")).to_pylist()]
            if all(row.variant != options.reference for row in measured):
                continue
            rows = [dataclasses.asdict(row) for row in differences_of(measured, options.reference)]
        for row in rows:  # in the plan's order: regime, then budget, then variant, each as it first comes
            for field in ("regime", "budget", "variant"):
                order.setdefault((field, row[field]), len(order))
        rows.sort(key=lambda row: [order[field, row[field]] for field in ("regime", "budget", "variant")])
        seeds = max(row["seeds"] for row in rows)
        shown = table(rows)
        if len({row["regime"] for row in rows}) > 1:
            metrics = [name for name in ("R@10", "R@1") if any(row["metric"] == name for row in rows)]
            shown = "\n\n".join(f"{metric}\n\n{pivot(rows, metric)}" for metric in metrics)
        print(f"\n## {name} ({seeds} seeds)\n\n{shown}")
        found[name] = [
            {k: round(v, 5) if isinstance(v, float) and math.isfinite(v) else None if v != v else v
             for k, v in row.items()}
            for row in rows if row["metric"] in _KEPT
        ]  # fmt: skip
    report = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "plans": found}
    if options.out:
        # A line a row: a thousand numbers must stay readable in a diff.
        lines = ",\n".join(
            f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
            for name, rows in found.items()
        )
        head = {name: value for name, value in report.items() if name != "plans"}
        options.out.write_text(json.dumps(head)[:-1] + ', "plans": {\n' + lines + "\n}}\n")
        json.loads(options.out.read_text())
    return report


if __name__ == "__main__":
    main()
