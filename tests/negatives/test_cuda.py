"""What only a GPU can show; skipped without one."""

import dataclasses

import pytest
import torch

from cmacc.clips import Manifest
from cmacc.negatives import kmeans_plusplus
from cmacc.pretraining import PretrainConfig, Trainer
from cmacc.pretraining.clip_stream import ClipStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_same_picks_as_on_a_cpu(dtype: torch.dtype) -> None:
    """Distances differ in the last bits only, which hardly ever moves a draw."""
    left, right = torch.randn(5000, 40).to(dtype), torch.randn(5000, 30).to(dtype)
    same = 0
    for seed in range(20):
        on_cpu, on_gpu = (
            kmeans_plusplus((left.to(d), right.to(d)), 50, generator=torch.Generator().manual_seed(seed))
            for d in ("cpu", "cuda")
        )
        assert on_gpu.device.type == "cuda"
        same += on_cpu.tolist() == on_gpu.tolist()
    assert same >= 19


def test_the_same_seed_gives_the_same_picks_on_every_run() -> None:
    points = torch.randn(100_000, 64, device="cuda")
    runs = {tuple(kmeans_plusplus(points, 200, generator=torch.Generator().manual_seed(1)).tolist()) for _ in range(5)}
    assert len(runs) == 1


def test_selection_on_its_own_stream_changes_nothing(small_config: PretrainConfig) -> None:
    config = dataclasses.replace(
        small_config,
        dictionary=dataclasses.replace(small_config.dictionary, initial_centers="dictionary", refresh="selected"),
    )
    device = torch.device("cuda")
    states = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for overlapped in (True, False):
            clips = ClipStream(Manifest.read(config.data.manifest), config, device)
            trainer = Trainer(clips, config, device)
            assert trainer.learner.selection_stream is not None
            trainer.learner.selection_stream = trainer.learner.selection_stream if overlapped else None
            for _ in trainer.steps(8):
                pass
            states.append(trainer.learner.dictionaries["audio"].negatives())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(states[0].sample_ids, states[1].sample_ids)
    torch.testing.assert_close(states[0].embedding, states[1].embedding)
