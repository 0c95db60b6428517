"""Features against single calls of the encoder on clips decoded here, and what is kept of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmacc.clips import ClipSpec, Manifest, decode_clip
from cmacc.clips.windows import spread_starts
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.transfer import CmaccEncoder, Modality, embed

BOTH: tuple[Modality, ...] = ("video", "audio")
SPEC = ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.0)


@pytest.fixture(scope="module")
def encoder() -> CmaccEncoder:
    torch.manual_seed(0)
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=32, hidden_size=32, embedding_size=16))
    return CmaccEncoder(pair, SPEC, False).eval()


@pytest.fixture(scope="module")
def manifest(small_world: Path) -> Manifest:
    return Manifest.read(small_world)


def test_every_window_is_the_encoder_on_that_clip(encoder: CmaccEncoder, manifest: Manifest) -> None:
    features = embed(encoder, manifest, [5, 3], BOTH, windows=3)
    assert features.failures == {}
    assert features.sample_ids.tolist() == [5, 3]
    record = manifest.records[3]
    starts = spread_starts(record.duration_seconds, 1.0, 3)
    assert features.start_seconds[1].tolist() == list(starts)
    assert features.matched["video"].shape == (2, 3, 16)
    matched = []
    with torch.inference_mode():
        for window, start in enumerate(starts):
            clip = decode_clip(Path(record.path), start, SPEC)
            video, audio = encoder.embed_video(clip.frames[None]), encoder.embed_audio(clip.waveform[None])
            assert np.allclose(features.by_modality["video"][1, window], video[0].numpy(), atol=1e-4)
            assert np.allclose(features.by_modality["audio"][1, window], audio[0].numpy(), atol=1e-4)
            matched.append(encoder.match_video(video)[0].double().numpy())
    # Every moment keeps its own embedding; who wants one of the file averages them.
    assert np.allclose(features.matched["video"][1], matched, atol=1e-5)
    mean = np.mean(matched, axis=0)
    assert np.allclose(features.matched_by_file()["video"][1], mean / np.linalg.norm(mean), atol=1e-5)


class Counting(nn.Module):
    """A matchless encoder that counts the clips it is given."""

    modalities: tuple[Modality, ...] = ("audio",)
    device = torch.device("cpu")

    def __init__(self, spec: ClipSpec = SPEC) -> None:
        super().__init__()
        self.spec = spec
        self._clips = 0

    def embed_video(self, frames: Tensor) -> Tensor:
        raise AssertionError("not asked for")

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        self._clips += len(waveforms)
        return torch.stack([waveforms.abs().mean(1), waveforms.square().mean(1)], dim=1)


class Projected(Counting):
    """Features are a projection of what a tower gives."""

    def __init__(self, tower: Counting | None) -> None:
        super().__init__()
        self._tower = tower

    @property
    def unprojected(self) -> Counting | None:
        return self._tower

    def project_audio(self, unprojected: Tensor) -> Tensor:
        return unprojected @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return self.project_audio(super().embed_audio(waveforms))


def test_a_tower_is_embedded_once_and_its_projection_computed(manifest: Manifest, tmp_path: Path) -> None:
    tower = Counting()
    encoder = Projected(tower)
    for _ in range(2):  # the second time from what was kept, of the tower
        features = embed(encoder, manifest, range(3), ["audio"], windows=2, cache=tmp_path)
        assert (tower._clips, encoder._clips) == (6, 0)
        assert features.unprojected["audio"].shape == (3, 2, 2)
        assert features.by_modality["audio"].shape == (3, 2, 3)
        whole = embed(Projected(None), manifest, range(3), ["audio"], windows=2)
        np.testing.assert_allclose(features.by_modality["audio"], whole.by_modality["audio"], rtol=1e-5)
        assert whole.unprojected == {}


def test_windows_that_coincide_are_decoded_once(manifest: Manifest) -> None:
    long = Counting(dataclasses.replace(SPEC, audio_seconds=60.0))
    features = embed(long, manifest, range(4), ["audio"], windows=10)
    assert long._clips == 4
    assert features.by_modality["audio"].shape == (4, 10, 2)
    assert (features.by_modality["audio"] == features.by_modality["audio"][:, :1]).all()
    assert features.matched == {}


def test_a_file_of_which_a_window_fails_is_left_out_whole(manifest: Manifest, tmp_path: Path) -> None:
    records = list(manifest.records[:4])
    (tmp_path / "text.mp4").write_text("no film")
    records[1] = dataclasses.replace(records[1], path=tmp_path / "text.mp4")
    features = embed(Counting(), Manifest(records), range(4), ["audio"], windows=2)
    assert features.sample_ids.tolist() == [0, 2, 3]
    assert list(features.failures) == [1]
    alone = embed(Counting(), manifest, [3], ["audio"], windows=2)
    assert np.array_equal(features.by_modality["audio"][2], alone.by_modality["audio"][0])


def test_features_are_kept_by_weights_files_and_windows(manifest: Manifest, tmp_path: Path) -> None:
    def clips_embedded(encoder: Counting, records: Manifest = manifest, ids: range = range(3), windows: int = 1) -> int:
        before = encoder._clips
        fresh = embed(encoder, records, ids, ["audio"], windows=windows)
        spent = encoder._clips - before
        kept = embed(encoder, records, ids, ["audio"], windows=windows, cache=tmp_path)
        assert np.array_equal(fresh.by_modality["audio"], kept.by_modality["audio"])
        assert fresh.sample_ids.tolist() == kept.sample_ids.tolist()
        return encoder._clips - before - spent

    assert clips_embedded(Counting()) == 3
    assert clips_embedded(Counting()) == 0
    assert clips_embedded(Counting(), windows=2) == 6
    assert clips_embedded(Counting(), ids=range(1, 4)) == 3
    assert clips_embedded(Counting(dataclasses.replace(SPEC, sample_rate_hz=8_000))) == 3
    weighty = Counting()
    weighty.register_buffer("filters", torch.ones(1), persistent=False)
    assert clips_embedded(weighty) == 3
    # The same files in other rows: what was kept is found, and given to the right rows.
    moved = Manifest([manifest.records[40], *manifest.records])
    assert clips_embedded(Counting(), moved, range(1, 4)) == 0
    # Where the content is not known by a hash, a file may have changed unseen.
    unknown = Manifest([dataclasses.replace(record, content_hash=None) for record in manifest.records])
    assert [clips_embedded(Counting(), unknown) for _ in range(2)] == [3, 3]
    for file in (tmp_path / "features").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert clips_embedded(Counting()) == 3
    assert clips_embedded(Counting()) == 0


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    features = embed(Counting(), manifest, [0, 1], ["audio"], cache=tmp_path / "file")
    assert len(features.sample_ids) == 2
    assert "features are not kept" in caplog.text
