"""Re-encode keys: a key is as old as the pool is deep, unless it is encoded again from the sample's kept input."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from cmacc.encoders import Encoding, Modality
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.problem import Batch


def refresh_keys(learner: Learner, chosen: Mapping[Modality, int], step: int) -> int:
    """Re-encode the keys that ``dictionary.refresh`` selects: none, those just chosen, or all keys.

    Parameters
    ----------
    chosen
        By modality, the number of keys chosen at this step: the newest ones of its dictionary.

    Returns
    -------
    int
        Number of re-encoded keys.
    """
    config = learner.config.dictionary
    if config.refresh_policy == "selected":
        return sum(refresh_newest(learner, modality, count, step) for modality, count in chosen.items())
    if config.refresh_policy == "dictionary" and step % config.refresh_every == 0:
        return sum(
            refresh_newest(learner, modality, len(dictionary.dictionary), step)
            for modality, dictionary in learner.dictionaries.items()
        )
    return 0


@torch.no_grad()
def refresh_newest(learner: Learner, modality: Modality, count: int, step: int) -> int:
    """Re-encode the newest ``count`` keys of a dictionary with the current key encoder.

    The augmented view is the one of the key's first encoding. The process that encoded a key first does it again, and
    all get the result. A key whose input is no longer kept is not changed, nor one whose new encoding is not finite.

    Returns
    -------
    int
        Number of re-encoded keys.
    """
    assert learner.input_buffer is not None
    if count == 0:
        return 0
    dictionary, processes = learner.dictionaries[modality], learner.processes
    held = dictionary.negatives()
    held = held[slice(len(held) - count, None)]
    own, handles = _own_handles(held.handles.cpu(), learner)
    own = own.to(held.embedding.device)
    names = ("embedding", "length", "penultimate")
    columns = [getattr(held, name).reshape(count, -1) for name in names]
    # One row for each key, with the count of processes that encoded it, none or one, in the first column.
    table = held.embedding.new_zeros(count, 1 + sum(column.shape[1] for column in columns))
    # In batches of a size that is known to fit into memory.
    encodings = [_encode(learner, modality, part) for part in handles.split(learner.rows_at_a_time) if len(part)]
    if encodings:
        fresh = Encoding.cat(encodings)
        rows = [getattr(fresh, name).reshape(len(handles), -1) for name in names]
        table[own] = torch.cat([torch.ones_like(rows[0][:, :1]), *rows], dim=1).to(table)
    processes.sum(table)
    # One that is not finite, as fp16 can give, would spoil every loss for as long as it is in the dictionary.
    is_fresh = (table[:, 0] > 0) & table.isfinite().all(1)
    for old, new in zip(columns, table[:, 1:].split([column.shape[1] for column in columns], dim=1), strict=True):
        old[is_fresh] = new[is_fresh]
    held.steps[is_fresh] = step
    dictionary.refresh(held)
    return int(is_fresh.sum())


def keep_inputs(learner: Learner, batch: Batch, visit: int) -> Int[Tensor, " batch"] | None:
    """Keep the inputs of this process's part of a batch.

    Returns
    -------
    Tensor or None
        ``(M / R,)``: a handle for each clip, distinct over all processes: its number in the run. None if no inputs are
        kept.
    """
    if learner.input_buffer is None:
        return None
    own = learner.input_buffer.push(learner.views.kept(batch, visit))
    batch_size = learner.config.optim.batch_size
    part, size = learner.processes.part(batch_size), learner.processes.part_size(batch_size)
    handles: Tensor = own // size * batch_size + part.start + own % size
    return handles


def _own_handles(handles: Int[Tensor, " keys"], learner: Learner) -> tuple[Tensor, Tensor]:
    """Which keys' inputs this process keeps, and their handles in its input buffer."""
    assert learner.input_buffer is not None
    batch_size = learner.config.optim.batch_size
    part, size = learner.processes.part(batch_size), learner.processes.part_size(batch_size)
    row = handles % batch_size
    own = handles // batch_size * size + row - part.start
    kept = (handles >= 0) & (row >= part.start) & (row < part.stop) & learner.input_buffer.has(own)
    return kept, own[kept]


def _encode(learner: Learner, modality: Modality, handles: Tensor) -> Encoding:
    assert learner.input_buffer is not None
    inputs = learner.views.again(modality, partial(learner.input_buffer.take, handles))
    with learner.autocast():
        encodings: dict[Modality, Encoding] = learner.key_encoder(**{modality: inputs})
    return encodings[modality]
