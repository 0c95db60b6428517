"""Embeddings of every sample at its last visit, and the order of the epoch that is computed from them.

The embeddings are a by-product of the step. The order of an epoch only depends on (seed, epoch, memory at its
beginning). It is kept and saved together with the memory, because the memory changes during the epoch and the order
could not be computed again.
"""

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from cmacc.clips import seeds
from cmacc.clips.loading.plan import epoch_order
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import Encoding, Modality
from cmacc.negatives import active_batches
from cmacc.pretraining.config import BatchesConfig
from cmacc.pretraining.processes import Processes


class SampleMemory(nn.Module):
    """Both embeddings of every sample, in half precision on the host: 512 bytes per sample for d = 128.

    Parameters
    ----------
    count
        Number of samples, with ids 0..count-1.
    size
        d, size of the embeddings.
    config
        Settings of the batches.
    batch_size
        M.
    seed
        Seed of the orders.
    processes
        The processes that train together, which all have the order of the first one. Default: this one alone.
    """

    video: Tensor
    audio: Tensor
    known: Tensor
    order: Tensor
    epoch: Tensor

    def __init__(
        self,
        count: int,
        size: int,
        config: BatchesConfig,
        batch_size: int,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self._processes = processes or Processes()
        self._config, self._batch_size, self._seed = config, batch_size, seed
        self.register_buffer("video", torch.zeros(count, size, dtype=torch.float16))
        self.register_buffer("audio", torch.zeros(count, size, dtype=torch.float16))
        self.register_buffer("known", torch.zeros(count, dtype=torch.bool))
        self.register_buffer("order", torch.zeros(count // batch_size * batch_size, dtype=torch.int64))
        self.register_buffer("epoch", torch.tensor(-1))  # the epoch of `order`

    def store(self, sample_ids: Int[Tensor, " batch"], encodings: dict[Modality, Encoding]) -> None:
        """Store the current embeddings of a batch."""
        rows = sample_ids.to(self.video.device)
        self.video[rows] = encodings["video"].embedding.detach().to(self.video)
        self.audio[rows] = encodings["audio"].embedding.detach().to(self.audio)
        self.known[rows] = True

    def order_of(self, epoch: int) -> NDArray[np.int64]:
        """Sample ids in the order of an epoch, batch after batch.

        The order is computed when an epoch is first requested, and kept until another one is. Epochs before
        ``batches.start_epoch`` are random.
        """
        if int(self.epoch) != epoch:
            # Another kind of processor may differ in the last bit of a product, and then in the order.
            self.order.copy_(self._processes.of_first(self._planned(epoch)))
            self.epoch.fill_(epoch)
        order: NDArray[np.int64] = self.order.numpy()
        return order

    def _planned(self, epoch: int) -> Tensor:
        config, count = self._config, len(self.known)
        if epoch < config.start_epoch:
            return torch.from_numpy(epoch_order(self._seed, epoch, count)[: len(self.order)])
        return active_batches(
            self.video,
            self.audio,
            self._batch_size,
            seeded_rng(seeds.BATCHES, self._seed, epoch),
            group_size=config.group_size,
            neighbours=config.neighbours,
            skip_nearest=config.skip_nearest,
            active_share=config.active_share,
            known=self.known,
        ).flatten()
