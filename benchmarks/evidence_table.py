"""The tables of docs/evidence.md, out of what `evidence.sh` left.

    python benchmarks/evidence_table.py evidence-out/tables [--out benchmarks/results/evidence-cpu.json]

One table a plan: the headline metric (R@10) of every variant, and its paired difference to the reference with the 95 %
bootstrap interval over seeds, wins : losses and the sign test; then the differences of both probes. All is measured at
the end of the runs. ``--out`` keeps the same as JSON, with the other metrics' means.
"""

import argparse
import json
import math
import platform
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

_TABLED = ("R@10", "probe_video", "probe_audio")
_KEPT = (
    *_TABLED, "R@1", "median_rank", "balanced_video", "balanced_audio", "plateau_steps", "left_plateau", "mi",
    "mi_ceiling", "batch_loss", "key_age", "distinct_labels", "false_negative_share", "effective_rank",
)  # fmt: skip


def difference(row: dict[str, Any]) -> str:
    """``+0.012 [-0.003, +0.027]``; empty for the reference."""
    if math.isnan(row["difference"]):
        return ""
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def table(rows: list[dict[str, Any]]) -> str:
    """A line a regime, budget and variant."""
    heads = ["regime", "budget", "variant", "seeds", "steps", "ms a step", "R@10", "R@10 minus reference [95 %]",
             "wins : losses, p", "probe picture, minus reference", "probe sound, minus reference"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (regime, budget, variant), group in groupby(rows, lambda r: (r["regime"], r["budget"], r["variant"])):
        by_metric = {row["metric"]: row for row in group}
        main = by_metric["R@10"]
        votes = "" if math.isnan(main["difference"]) else f"{main['wins']} : {main['losses']}, {main['p_value']:.2g}"
        probes = [difference(by_metric[name]) if name in by_metric else "–" for name in ("probe_video", "probe_audio")]
        cells = [regime or "–", budget, variant, str(main["seeds"]), f"{main['steps']:,}",
                 f"{1000 * main['step_seconds']:.1f}", f"{main['mean']:.3f} ± {main['deviation']:.3f}",
                 difference(main), votes, *probes]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, help="folder of NAME-differences.parquet")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for path in sorted(options.tables.glob("*-differences.parquet")):
        name = path.name.removesuffix("-differences.parquet")
        order: dict[tuple[str, ...], int] = {}
        rows = pq.read_table(path).to_pylist()
        for row in rows:  # in the plan's order: regime, then budget, then variant, each as it first comes
            for field in ("regime", "budget", "variant"):
                order.setdefault((field, row[field]), len(order))
        rows.sort(key=lambda row: [order[field, row[field]] for field in ("regime", "budget", "variant")])
        print(f"\n## {name}\n\n{table(rows)}")
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
