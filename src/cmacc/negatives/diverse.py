"""Diverse rows out of many, for choosing what to label or to keep: the dictionary's seeding on tables of any size."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from cmacc.negatives.rows import Array, Rows
from cmacc.negatives.seeding import CENTRES_AT_A_TIME, MOST_PROPOSALS, SUMMED_ROWS, check_tables, exact_products, seed
from cmacc.negatives.shards import Shards

# Nearest distance, squared length, and whether the row may still be picked.
_STATE_BYTES_A_ROW = 9


def select_diverse(
    points: Array | tuple[Array, Array],
    count: int,
    *,
    given: Array | tuple[Array, Array] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    memory_bytes: int = 1 << 30,
    progress: bool = True,
) -> Int[Tensor, " count"]:
    """Pick ``count`` rows by exact k-means++ seeding from a table that need not fit into memory.

    A pass over the table is a read of the file; there are a few in all, hardly more for a thousand picks than for ten.

    Parameters
    ----------
    points
        ``(N, D)``, or ``((N, a), (N, b))`` factors of rank-one rows such as gradient embeddings; tensors or numpy
        arrays, among them memory maps (``numpy.load(path, mmap_mode="r")``), of a float type.
    count
        Number of picks, 1 <= count <= N.
    given
        Rows chosen before, of the same columns, from which the picks shall differ too.
    generator
        Source of randomness, on the CPU; the same state gives the same picks, whatever ``memory_bytes``.
    device
        Where distances are computed; parts of the table are brought there.
    memory_bytes
        Most memory to use beside the tables: the state of N rows (9 bytes each), a part of the table, a block's work.
    progress
        Whether to show a bar on stderr where that is a terminal.

    Returns
    -------
    Tensor
        ``(count,)`` int64 indices in the order of picking, on the CPU.

    Raises
    ------
    ValueError
        Shapes do not fit, ``count`` is more than the rows, a row holds NaN or infinity, or ``memory_bytes`` is too few.

    Examples
    --------
    >>> import numpy
    >>> table = numpy.concatenate([numpy.zeros((500, 8)), numpy.eye(8)])
    >>> sorted(select_diverse(table, 9, progress=False).tolist())[1:]
    [500, 501, 502, 503, 504, 505, 506, 507]
    """
    tables = check_tables("select_diverse", "points", points)
    centres = check_tables("select_diverse", "given", given, like=tables) if given is not None else None
    device = torch.device(device)
    part_rows = _part_rows(tables, memory_bytes)
    with torch.no_grad(), exact_products(device), _bar(len(tables[0]), count, progress) as bar:
        on_read, on_picked = bar
        rows = Rows(tables, Shards(len(tables[0])), device, part_rows, "select_diverse", on_read)
        eligible = torch.ones(len(rows), dtype=torch.bool, device=device)
        number = rows.shards.agreed_number(generator)
        return seed(
            rows, count, eligible, number, given=centres, on_picked=on_picked, owner="select_diverse"
        ).indices  # fmt: skip


def _part_rows(tables: tuple[Array, ...], memory_bytes: int) -> int:
    """Rows that can be worked on at a time in what the whole table's state leaves of the memory."""
    count, width = len(tables[0]), sum(table.shape[1] for table in tables)
    # A part as read, in working precision, and measured from the midst; its distances to a tile of centres, twice.
    a_row = 8 * (3 * width + 2 * CENTRES_AT_A_TIME)
    # The sums' whole numbers, and a block's rows and distances.
    fixed = _STATE_BYTES_A_ROW * count + 24 * min(count, SUMMED_ROWS) + 16 * MOST_PROPOSALS * (MOST_PROPOSALS + width)
    rows = (memory_bytes - fixed) // a_row
    if rows < min(count, 64):
        raise ValueError(
            f"select_diverse: memory_bytes must be at least {fixed + 64 * a_row} for {count} rows of {width} columns, "
            f"got {memory_bytes}"
        )
    # More than fits into a processor's cache would only be slower.
    return int(min(rows, max(256, (1 << 22) // width)))


@contextmanager
def _bar(
    row_count: int, pick_count: int, wanted: bool
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """What to call with rows read and with picks made."""
    if not (wanted and sys.stderr.isatty()):
        yield (lambda rows: None), (lambda picked: None)
        return
    from rich.console import Console  # of the whole room only this wants it
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        reading = progress.add_task(f"0 of {pick_count} picked, reading", total=row_count)

        def on_read(rows: int) -> None:
            if progress.tasks[0].finished:
                progress.reset(reading)
            progress.advance(reading, rows)

        def on_picked(picked: int) -> None:
            progress.update(reading, description=f"{picked} of {pick_count} picked, reading")

        yield on_read, on_picked
