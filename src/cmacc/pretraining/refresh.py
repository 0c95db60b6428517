"""Re-encode keys: a key is as old as the pool is deep, unless it is encoded again from the sample's kept input."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from cmacc.encoders import Encoding, Modality
from cmacc.negatives import Keys
from cmacc.pretraining.learner import Learner


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

    The augmented view is the one of the key's first encoding. A key whose input is no longer kept is not changed.

    Returns
    -------
    int
        Number of re-encoded keys.
    """
    assert learner.input_buffer is not None
    dictionary = learner.dictionaries[modality]
    held = dictionary.negatives()
    held = held[slice(len(held) - count, None)]
    handles = held.handles.cpu()
    kept = learner.input_buffer.has(handles).nonzero().flatten()
    if len(kept) == 0:
        return 0
    # In batches of the training batch size, which is known to fit into memory.
    encodings = [_encode(learner, modality, handles[part]) for part in kept.split(learner.config.optim.batch_size)]
    fresh = Keys(
        embedding=torch.cat([e.embedding for e in encodings]),
        length=torch.cat([e.length for e in encodings]),
        penultimate=torch.cat([e.penultimate for e in encodings]),
        sample_ids=held.sample_ids[kept],
        steps=torch.full_like(held.steps[kept], step),
        handles=held.handles[kept],
    )
    for old, new in zip(held.fields(), fresh.fields(), strict=True):
        old[kept.to(old.device)] = new.to(old)
    dictionary.refresh(held)
    return len(kept)


def _encode(learner: Learner, modality: Modality, handles: Tensor) -> Encoding:
    assert learner.input_buffer is not None
    inputs = learner.views.again(modality, partial(learner.input_buffer.take, handles))
    with learner.autocast():
        encodings: dict[Modality, Encoding] = learner.key_encoder(**{modality: inputs})
    return encodings[modality]
