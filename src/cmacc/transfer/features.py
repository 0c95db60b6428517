"""A manifest's clips to features: the frozen encoders over evenly spread windows, without augmentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cmacc.clips import LogMel, Manifest, evaluation_loader, evaluation_requests, grey_video, to_video
from cmacc.encoders import AudioVisualEncoder
from cmacc.pretraining import PretrainConfig
from cmacc.transfer.protocols import unit_rows

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Features:
    """Features of n files, a row each, averaged over the file's windows.

    Attributes
    ----------
    sample_ids
        ``(n,)`` int64 rows of the manifest.
    start_seconds
        ``(n,)`` start of each file's first window.
    video, audio
        ``(n, f)`` backbone features, which probes use.
    video_embedding, audio_embedding
        ``(n, d)``, of length one, which retrieval uses.
    """

    sample_ids: NDArray[np.int64]
    start_seconds: NDArray[np.float64]
    video: NDArray[np.float32]
    audio: NDArray[np.float32]
    video_embedding: NDArray[np.float32]
    audio_embedding: NDArray[np.float32]


@torch.inference_mode()
def embed(
    encoder: AudioVisualEncoder,
    manifest: Manifest,
    sample_ids: Sequence[int],
    config: PretrainConfig,
    *,
    windows_per_file: int = 1,
    workers: int = 0,
    progress: Progress | None = None,
) -> tuple[Features, dict[int, str]]:
    """Encode files as a run of ``config`` sees them.

    Parameters
    ----------
    encoder
        In evaluation mode; its device is where the work is done.
    manifest, sample_ids
        Which files.
    config
        Gives the size of the clips, the mel bands, and whether pictures are grey.
    windows_per_file
        Windows averaged per file.
    workers
        Decoding processes.
    progress
        Called with (windows done, windows in all).

    Returns
    -------
    Features, dict
        Of the files that decode, in the order asked for; and ``{sample id: reason}`` of the others.
    """
    device = next(encoder.parameters()).device
    log_mel = LogMel(config.data.clip.sample_rate_hz, config.encoder.mel_bins).to(device)
    requests = evaluation_requests(manifest, sample_ids, config.data.clip.length_seconds, windows_per_file)
    loader = evaluation_loader(
        manifest, requests, config.data.clip, batch_size=config.optim.batch_size, workers=workers
    )
    failures: dict[int, str] = {}
    ids: list[int] = []
    rows: list[list[NDArray[np.float32]]] = [[], [], [], []]
    done = 0
    for batch in loader:
        failures |= batch.failures
        done += len(batch.sample_ids) + len(batch.failures)
        if len(batch.sample_ids):
            video = to_video(batch.frames.to(device))
            if config.data.augment.grey_probability == 1:
                video = grey_video(video)
            v, a = encoder(video, log_mel(batch.waveforms.to(device)))
            for collected, tensor in zip(rows, (v.feature, a.feature, v.embedding, a.embedding), strict=True):
                collected.append(tensor.float().cpu().numpy())
            ids += batch.sample_ids.tolist()
        if progress is not None:
            progress(min(done, len(requests)), len(requests))
    # A file of which one window fails is left out whole: an average over fewer windows is another thing.
    kept = [i for i in sample_ids if i not in failures]
    places: dict[int, list[int]] = {i: [] for i in kept}
    for place, sample_id in enumerate(ids):
        if sample_id in places:
            places[sample_id].append(place)
    averaged = [_averaged(collected, list(places.values())) for collected in rows]
    starts = {request.sample_id: request.start_seconds for request in reversed(requests)}
    features = Features(
        sample_ids=np.asarray(kept, np.int64),
        start_seconds=np.asarray([starts[i] for i in kept], np.float64),
        video=averaged[0],
        audio=averaged[1],
        video_embedding=unit_rows(averaged[2]),
        audio_embedding=unit_rows(averaged[3]),
    )
    return features, failures


def _averaged(batches: list[NDArray[np.float32]], places: list[list[int]]) -> NDArray[np.float32]:
    if not batches or not places:
        return np.zeros((0, 0), np.float32)
    rows = np.concatenate(batches)
    return np.stack([rows[place].mean(0) for place in places])
