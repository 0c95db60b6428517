"""Select diverse rows from tables of any size, for example samples to label or to keep, by k-means++ seeding."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cmacc.negatives.rows import Array, Rows, check_tables, exact_products, working_type
from cmacc.negatives.seeding import CENTRES_AT_A_TIME, MOST_PROPOSALS, SUMMED_ROWS, seed
from cmacc.negatives.shards import Shards


def select_diverse(
    points: Array | tuple[Array, Array],
    count: int,
    *,
    initial_centers: Array | tuple[Array, Array] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    memory_bytes: int = 1 << 30,
    progress: bool = True,
) -> Int[Tensor, " count"]:
    """Pick ``count`` rows by exact k-means++ seeding, from a table that may be larger than memory.

    A pass over the table reads the whole file. There are only a few, hardly more for a thousand picks than for ten.

    Parameters
    ----------
    points
        ``(N, D)``, or ``((N, a), (N, b))`` factors of rank-one rows such as gradient embeddings; tensors, numpy arrays
        or memory maps (``numpy.load(path, mmap_mode="r")``), of a float type.
    count
        Number of picks, 1 <= count <= N.
    initial_centers
        Rows chosen before, with the same columns, which count as centres already picked.
    generator
        Source of randomness, on the CPU; the same state gives the same picks, whatever ``memory_bytes`` is.
    device
        Where distances are computed; parts of the table are moved there.
    memory_bytes
        Maximum memory beside the tables: the state of N rows (9 bytes each; 17 for float64), ``initial_centers``, a
        part of the table, and the work of a block.
    progress
        Whether to show a progress bar on stderr, if that is a terminal.

    Returns
    -------
    Tensor
        ``(count,)`` int64 indices in the order of picking, on the CPU.

    Raises
    ------
    ValueError
        Shapes do not fit, ``count`` is more than the rows, a row holds NaN or infinity, or ``memory_bytes`` is too low.

    Examples
    --------
    >>> import numpy
    >>> table = numpy.concatenate([numpy.zeros((500, 8)), numpy.eye(8)])
    >>> sorted(select_diverse(table, 9, progress=False).tolist())[1:]
    [500, 501, 502, 503, 504, 505, 506, 507]
    """
    kinds = (Tensor, np.ndarray)
    tables = check_tables("select_diverse", "points", points, kinds=kinds)
    centres = None
    if initial_centers is not None:
        centres = check_tables("select_diverse", "initial_centers", initial_centers, like=tables, kinds=kinds)
    device = torch.device(device)
    part_rows = _part_rows(tables, 0 if centres is None else len(centres[0]), memory_bytes)
    with torch.no_grad(), exact_products(device), _bar(len(tables[0]), count, progress) as bar:
        on_read, on_picked = bar
        shards = Shards(len(tables[0]))
        rows = Rows(tables, shards, device, part_rows, "select_diverse", initial_centers=centres, on_read=on_read)
        number = shards.agreed_number(generator)
        return seed(rows, count, None, number, on_picked=on_picked, owner="select_diverse").indices


def _part_rows(tables: tuple[Array, ...], center_rows: int, memory_bytes: int) -> int:
    """Number of rows in a part that fit into the memory that the state of the whole table leaves."""
    count, width = len(tables[0]), sum(table.shape[1] for table in tables)
    # A part as read, in working precision, and centred; its distances to a tile of centres, twice.
    number = working_type(tables).itemsize
    a_row = 8 * (3 * width + 2 * CENTRES_AT_A_TIME)
    fixed = (
        (2 * number + 1) * count  # nearest distance, squared length, and whether the row may still be picked
        + 24 * min(count, SUMMED_ROWS)  # the integers to sum
        + 4 * number * MOST_PROPOSALS * (MOST_PROPOSALS + width)  # a block's rows and distances
        + 4 * number * width * center_rows  # in working precision, scaled, and centred
    )
    rows = (memory_bytes - fixed) // a_row
    if rows < min(count, 64):
        raise ValueError(
            f"select_diverse: memory_bytes must be at least {fixed + 64 * a_row} for {count} rows of {width} columns "
            f"and {center_rows} initial centers, got {memory_bytes}"
        )
    # Parts larger than the processor's cache would only be slower.
    return int(min(rows, max(256, (1 << 22) // width)))


@contextmanager
def _bar(
    row_count: int, pick_count: int, wanted: bool
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Callbacks for rows read and for picks made."""
    if not (wanted and sys.stderr.isatty()):
        yield (lambda rows: None), (lambda picked: None)
        return
    from rich.console import Console  # only this function of the folder needs it
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
