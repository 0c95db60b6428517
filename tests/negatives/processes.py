"""What every process of `test_processes` runs: ``python processes.py RANK PROCESSES STORE OUT``.

Each process takes its own part of the rows, of which the parts are of unequal sizes and one is empty, and writes what
came out as JSON. With one process there is no group: that is the answer that the others must give.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.negatives import ActiveDictionary, Keys, kmeans_plusplus


def cuts(rows: int, processes: int) -> list[int]:
    """Borders of the parts: the second process, of more than two, holds nothing; the first holds three rows."""
    return {1: [0, rows], 2: [0, 3, rows], 4: [0, 3, 3, rows // 2 + 1, rows]}[processes]


def part(table: Tensor, rank: int, processes: int) -> Tensor:
    borders = cuts(len(table), processes)
    return table[borders[rank] : borders[rank + 1]]


def outcomes(rank: int = 0, processes: int = 1, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Picks of many seeds by every method, and the errors that all processes must see."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    few = normal(6, 2) * 3, normal(6, 2)
    kinds = torch.arange(500) % 20
    many = normal(20, 30)[kinds] + 0.2 * normal(500, 30), normal(20, 17)[kinds] + 0.2 * normal(500, 17)
    flat = 100 + normal(300, 40)
    copies = normal(4, 5)[torch.arange(40) % 4]
    given = many[0][:9] + 1, many[1][:9] + 1
    eligible = torch.arange(500) % 3 > 0

    def own(points: Tensor | tuple[Tensor, ...]) -> Any:
        if isinstance(points, tuple):
            return tuple(part(table, rank, processes) for table in points)
        return part(points, rank, processes)

    def picks(points: Any, count: int, seeds: int, **options: Any) -> list[list[int]]:
        return [
            # Only the first process's generator may matter.
            kmeans_plusplus(
                own(points),
                count,
                generator=torch.Generator().manual_seed(seed if rank == 0 else 7),
                group=group,
                **options,
            ).tolist()
            for seed in range(seeds)
        ]

    result: dict[str, Any] = {
        "few, blocks": picks(few, 3, 30),
        "few, one by one": picks(few, 3, 10, method="one_by_one"),
        "few, greedy": picks(few, 3, 10, local_trials=3),
        "many": picks(many, 60, 3),
        "many, greedy": picks(many, 20, 1, local_trials=4),
        "given, eligible": picks(many, 60, 2, initial_centers=given, eligible=part(eligible, rank, processes)),
        "flat": picks(flat, 40, 2),
        "flat, double": picks(flat.double(), 40, 1),
        "copies": picks(copies, 30, 2),
        "all": picks(flat, 300, 1),
        "large": picks(tuple(2.0**60 * factor for factor in many), 60, 1),
    }
    broken = many[0].clone()
    broken[400, 3] = torch.nan
    for name, points, count in (("not finite", (broken, many[1]), 5), ("too many", flat, 301)):
        try:
            picks(points, count, 1)
        except ValueError as error:
            result[name] = str(error)
    return result


def dictionaries(rank: int = 0, processes: int = 1, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Sample ids in the dictionaries after steps of 8 clips, of which each process encodes its share."""
    generator = torch.Generator().manual_seed(1)
    result: dict[str, Any] = {}
    for selector in ("newest", "hardest", "random", "active"):
        dictionary = ActiveDictionary(
            6,
            24,
            64 // processes,
            penultimate_size=5,
            temperature=0.2,
            selector=selector,
            initial_centers="dictionary" if selector == "active" else "none",
        )
        for step in range(20):
            queries, embedding = normalize(torch.randn(2, 8, 6, generator=generator), dim=2)
            penultimate = torch.randn(8, 5, generator=generator)
            ids = (torch.arange(8) + 8 * step) % 60
            own = slice(8 * rank // processes, 8 * (rank + 1) // processes)
            chances = torch.Generator().manual_seed(step if rank == 0 else 99)
            dictionary.select(queries[own], 8, chances, query_ids=ids[own], group=group)
            dictionary.push(Keys.from_embedding(embedding[own], ids[own], step, penultimate=penultimate[own]))
        negatives = dictionary.negatives()
        result[selector] = {"ids": negatives.sample_ids.tolist(), "sum": float(negatives.penultimate.double().sum())}
    return result


def main(rank: int, processes: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    group = dist.group.WORLD
    found = {"picks": outcomes(rank, processes, group), "dictionaries": dictionaries(rank, processes, group)}
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
