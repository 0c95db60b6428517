"""Keys encoded anew: a pool's key is as old as the pool is deep, unless the sample's input was kept."""

from functools import partial

import torch
from torch import Tensor

from cmacc.encoders import Encoding
from cmacc.negatives import ActiveDictionary, Keys
from cmacc.pretraining.learner import Learner


@torch.no_grad()
def refresh_newest(learner: Learner, dictionary: ActiveDictionary, count: int, step: int) -> int:
    """Encode the newest ``count`` keys of a dictionary with the momentum encoder of now.

    The view is that of the key's first encoding. A key whose input is no longer kept stays as it is.

    Returns
    -------
    int
        Keys encoded.
    """
    assert learner.inputs is not None
    held = dictionary.negatives()
    held = held[slice(len(held) - count, None)]
    handles = held.handles.cpu()
    kept = learner.inputs.has(handles).nonzero().flatten()
    if len(kept) == 0:
        return 0
    # In batches of the training's own size, which is known to fit into memory.
    encodings = [_encode(learner, dictionary, handles[part]) for part in kept.split(learner.config.optim.batch_size)]
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


def _encode(learner: Learner, dictionary: ActiveDictionary, handles: Tensor) -> Encoding:
    assert learner.inputs is not None
    kept = partial(learner.inputs.take, handles)
    if dictionary is learner.video_dictionary:
        encoder, inputs = learner.twin.video, learner.views.video_again(kept)
    else:
        encoder, inputs = learner.twin.audio, learner.views.audio_again(kept)
    with learner.autocast():
        encoding: Encoding = encoder(inputs)
    return encoding
