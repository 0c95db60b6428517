"""The model in MTEB's own harness, on MTEB's mock tasks and on real task classes with small local data."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import scipy.io.wavfile
import torch
from numpy.typing import NDArray
from torch import nn

from cmacc.clips import ClipSpec, Manifest, MediaError, decode_clip, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.standing.mteb import CmaccMTEB, main
from cmacc.transfer import CmaccEncoder, EncoderError, Features, LogMelStatistics, embed, weights_hash

# The clips are the same, but in batches of other sizes.
TOLERANCE = 1e-4
# MTEB's probes stop after 100 iterations and warn of classes that they never chose.
FEW = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning", "ignore::sklearn.exceptions.UndefinedMetricWarning"
)


class _WavEncoder:
    """In place of torchcodec's, which MTEB's mock tasks write their audio with."""

    def __init__(self, samples: torch.Tensor, *, sample_rate: int) -> None:
        self.samples, self.sample_rate = samples, sample_rate

    def to_file_like(self, file: io.BytesIO, format: str, num_channels: int | None = None) -> None:
        assert format == "wav"
        scipy.io.wavfile.write(file, self.sample_rate, self.samples.numpy())


@pytest.fixture(scope="module")
def mteb() -> Any:
    """MTEB, which must not reach for the network, with what its mock tasks need of torchcodec."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        mteb = pytest.importorskip("mteb")
        codec = types.ModuleType("torchcodec.encoders")
        codec.AudioEncoder = _WavEncoder  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
        patch.setitem(sys.modules, "torchcodec.encoders", codec)
        yield mteb


@pytest.fixture(scope="module")
def encoder() -> CmaccEncoder:
    torch.manual_seed(0)
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=32, hidden_size=32, embedding_size=16))
    clip = ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.0)
    return CmaccEncoder(pair, clip, False).eval()


@pytest.fixture(scope="module")
def model(mteb: Any, encoder: CmaccEncoder) -> CmaccMTEB:
    return CmaccMTEB(encoder, "cmacc/tiny")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("world")
    world = WorldConfig(clip_count=12, class_count=2, nuisance=0.0, frame_size=48, duration_seconds=2.0)
    write_world(world, folder / "lossy", workers=1)
    (folder / "lossless").mkdir()
    for path in sorted((folder / "lossy").rglob("*.mp4")):
        _make_lossless(path, folder / "lossless" / f"{path.stem}.mkv")
    return scan(list_folders([folder / "lossless"])).manifest


def _make_lossless(source: Path, target: Path) -> None:
    """With PCM, since AAC decodes a little differently after a seek, and with the pictures as they are."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        pictures = written.add_stream_from_template(read.streams.video[0])
        sound = written.add_stream("pcm_f32le", rate=read.streams.audio[0].rate, layout="stereo")
        for packet in read.demux():
            if packet.stream.type == "video" and packet.size:
                packet.stream = pictures
                written.mux(packet)
            elif packet.stream.type == "audio":
                resampler = av.AudioResampler("flt")
                for frame in packet.decode():
                    written.mux([new for part in resampler.resample(frame) for new in sound.encode(part)])
        written.mux(sound.encode(None))


@pytest.fixture(scope="module")
def world(mteb: Any, manifest: Manifest) -> Any:
    """The videos and, apart from them, their audio, as in the data sets of MTEB."""
    from datasets import Audio, Dataset, Video

    records = manifest.records
    columns = {
        "video": [Path(record.path).read_bytes() for record in records],
        "audio": [_wav(Path(record.path), record.duration_seconds) for record in records],
        "video_caption": ["what is seen"] * 12,
        "audio_caption": ["what is heard"] * 12,
        "target": [0, 1] * 6,
    }
    return Dataset.from_dict(columns).cast_column("video", Video()).cast_column("audio", Audio())


def _wav(path: Path, seconds: float) -> bytes:
    """The beginning of the audio of a video."""
    with av.open(str(path)) as container:
        [stream] = container.streams.audio
        samples = np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in container.decode(stream)])
        file = io.BytesIO()
        scipy.io.wavfile.write(file, stream.rate, samples[: round(seconds * stream.rate)])
    return file.getvalue()


def _encoded(model: CmaccMTEB, task: Any, dataset: Any, workers: int | None = None) -> NDArray[np.float32]:
    from mteb._create_dataloaders import create_dataloader

    loader = create_dataloader(dataset, task_metadata=task.metadata, batch_size=5, num_proc=workers)
    return model.encode(
        loader, task_metadata=task.metadata, hf_split="test", hf_subset="default", show_progress_bar=False
    )


@pytest.fixture(scope="module")
def features(encoder: CmaccEncoder, manifest: Manifest) -> Features:
    return embed(encoder, manifest, range(12), ("video", "audio"), windows=3)


def test_it_is_a_model_of_mteb(mteb: Any, model: CmaccMTEB, encoder: CmaccEncoder) -> None:
    assert isinstance(model, mteb.EncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision) == ("cmacc/tiny", weights_hash(encoder))
    assert meta.n_parameters == sum(p.numel() for p in encoder.parameters())
    assert meta.embed_dim == 16
    assert meta.modalities == ["video", "audio"]
    assert meta.experiment_name is None
    assert CmaccMTEB(encoder, "cmacc/tiny", "1", windows=3).mteb_model_meta.experiment_name == "windows_3"
    rows = torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    assert torch.allclose(model.similarity(rows, rows), rows @ rows.T, atol=1e-6)
    assert torch.allclose(model.similarity_pairwise(rows, rows), torch.ones(3), atol=1e-6)


def test_mtebs_mock_tasks_run_to_their_end(mteb: Any, model: CmaccMTEB) -> None:
    from mteb.mocks import mock_tasks

    tasks = [
        mock_tasks.MockAny2AnyRetrievalA2ATask(),
        mock_tasks.MockAudioReranking(),
        mock_tasks.MockAudioClassificationCrossVal(),
        mock_tasks.MockVideoClassification(),
        mock_tasks.MockVideoClusteringTask(),
        mock_tasks.MockVideoPairClassificationTask(),
        mock_tasks.MockVideoAudioClassification(),
        mock_tasks.MockVideoAudioClusteringTask(),
        mock_tasks.MockVideoAudioPairClassificationTask(),
        mock_tasks.MockAsymVideoAudioPairClassificationTask(),
    ]
    assert all(model.fits(task) for task in tasks)
    results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False).task_results
    scores = {result.task_name: result.get_score() for result in results}
    assert len(scores) == len(tasks)
    assert scores["MockAny2AnyRetrievalA2A"] == 1.0  # the documents are the queries
    assert not model.fits(mock_tasks.MockVideoRetrievalV2T())


@pytest.mark.filterwarnings("ignore:The task .* is currently in beta:UserWarning")
@pytest.mark.parametrize(
    ("name", "query", "document"),
    [("VGGSoundAVA2VRetrieval", "audio", "video"), ("VGGSoundAVV2ARetrieval", "video", "audio")],
)
def test_retrieval_on_vggsound_ranks_by_the_common_space(
    mteb: Any, model: CmaccMTEB, world: Any, features: Features, monkeypatch: pytest.MonkeyPatch, name: Any,
    query: Any, document: Any,
) -> None:  # fmt: skip
    from mteb.tasks.retrieval.eng import vggsound_av_retrieval

    monkeypatch.setattr(vggsound_av_retrieval, "load_dataset", lambda *_, **__: world)
    task = mteb.get_task(name)
    model = CmaccMTEB(model.encoder, "cmacc/tiny", windows=3)
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    matched = features.matched_by_file()
    cosines = matched[query] @ matched[document].T
    rank = (cosines > cosines.diagonal()[:, None]).sum(1)
    [scores] = result.scores["test"]
    for depth in (1, 3, 5):
        assert scores[f"recall_at_{depth}"] == pytest.approx((rank < depth).mean(), abs=1e-4)
    assert scores["ndcg_at_10"] == pytest.approx(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean(), abs=1e-4)


@FEW
def test_classification_on_esc50_is_that_of_the_features(
    mteb: Any, model: CmaccMTEB, world: Any, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import DatasetDict
    from mteb.abstasks import abstask

    monkeypatch.setattr(abstask, "load_dataset", lambda *_, **__: DatasetDict(train=world))
    task = mteb.get_task("ESC50")
    model = CmaccMTEB(model.encoder, "cmacc/tiny", windows=3)
    [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    assert result.get_score() > 0
    rows = _encoded(model, task, world)
    assert np.allclose(rows, features.by_modality["audio"].mean(1), atol=TOLERANCE)
    assert np.ptp(rows, axis=0).max() > 20 * TOLERANCE


def test_rows_with_both_modalities(mteb: Any, model: CmaccMTEB, world: Any, features: Features) -> None:
    model = CmaccMTEB(model.encoder, "cmacc/tiny", windows=3)
    probed = _encoded(model, mteb.get_task("AVEDatasetClassification"), world)
    concatenated = np.concatenate([features.by_modality[m].mean(1) for m in ("video", "audio")], axis=1)
    assert np.allclose(probed, concatenated, atol=TOLERANCE)

    compared = _encoded(model, mteb.get_task("MusicAVQAVAPairClassification"), world)
    mean = sum(features.matched_by_file().values())
    assert np.allclose(compared, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=TOLERANCE)


def test_a_row_may_lack_one_modality(mteb: Any, model: CmaccMTEB, world: Any) -> None:
    from datasets import Audio, Dataset, Video

    raw = world.cast_column("video", Video(decode=False)).cast_column("audio", Audio(decode=False))
    columns = {"video": [raw[0]["video"], None], "audio": [None, raw[1]["audio"]]}
    rows = Dataset.from_dict(columns, features=raw.select_columns(["video", "audio"]).features)
    pairs = mteb.get_task("MusicAVQAVAPairClassification")
    video = _encoded(model, pairs, world.select([0]).remove_columns("audio"))
    audio = _encoded(model, pairs, world.select([1]).remove_columns("video"))
    assert np.allclose(_encoded(model, pairs, rows), np.concatenate([video, audio]), atol=1e-5)
    probed = _encoded(model, mteb.get_task("AVEDatasetClassification"), rows)
    zeros = probed == 0
    assert zeros[0].any()
    assert not (zeros[0] & zeros[1]).all()
    half = probed.shape[1] // 2
    assert zeros[0, half:].all()
    assert zeros[1, :half].all()


def test_an_encoder_of_audio_alone(mteb: Any, manifest: Manifest, tmp_path: Path) -> None:
    import datasets

    statistics = LogMelStatistics().eval()
    model = CmaccMTEB(statistics, "cmacc/statistics")
    assert model.mteb_model_meta.modalities == ["audio"]
    assert model.mteb_model_meta.embed_dim == 320
    assert model.fits(mteb.get_task("ESC50"))
    assert not model.fits(mteb.get_task("AVEDatasetClassification"))
    # Shorter than a clip of this encoder, and looped.
    path = tmp_path / "short.wav"
    path.write_bytes(_wav(Path(manifest.records[0].path), 1.5))
    dataset = datasets.Dataset.from_dict({"audio": [str(path)]}).cast_column("audio", datasets.Audio())
    start = (1.5 - statistics.spec.length_seconds) / 2
    own = statistics.embed_audio(decode_clip(path, start, statistics.spec).waveform[None]).numpy()
    compared = _encoded(model, mteb.get_task("ESC50Clustering"), dataset)
    assert np.allclose(compared, own / np.linalg.norm(own), atol=1e-5)
    assert np.allclose(_encoded(model, mteb.get_task("ESC50"), dataset), own, atol=1e-4)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_damaged_file_is_named(mteb: Any, model: CmaccMTEB, workers: int | None) -> None:
    from datasets import Dataset, Video

    dataset = Dataset.from_dict({"video": [b"no video"]}).cast_column("video", Video())
    task = mteb.get_task("HMDB51Classification")
    with pytest.raises(MediaError, match=r"^task HMDB51Classification, row 0, video: does not decode [^\n]*$"):
        _encoded(model, task, dataset, workers)


def test_what_is_no_file_of_that_modality(mteb: Any, model: CmaccMTEB, manifest: Manifest) -> None:
    from datasets import Dataset, Video

    task = mteb.get_task("HMDB51Classification")
    sound = Dataset.from_dict({"video": [_wav(Path(manifest.records[0].path), 1.0)]})
    with pytest.raises(MediaError, match="row 0, video: no video in the file"):
        _encoded(model, task, sound.cast_column("video", Video()))
    absent = Dataset.from_dict({"video": ["/not/there.mp4"]}).cast_column("video", Video())
    with pytest.raises(MediaError, match=r"row 0, video /not/there.mp4: no such file"):
        _encoded(model, task, absent)
    empty = Dataset.from_dict({"video": [None]}, features=absent.features)
    with pytest.raises(MediaError, match="row 0: no file in video"):
        _encoded(model, task, empty)
    with pytest.raises(EncoderError, match=r"column video must be a datasets.Audio or datasets.Video"):
        _encoded(model, task, Dataset.from_dict({"video": [1]}))
    with pytest.raises(EncoderError, match="HMDB51Classification: must have a column of video, audio"):
        _encoded(model, task, Dataset.from_dict({"label": [1]}))


class _Apart(nn.Module):
    """Both modalities without a common space."""

    modalities = ("video", "audio")
    spec = ClipSpec()
    device = torch.device("cpu")

    def embed_video(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.flatten(1).float()

    def embed_audio(self, waveforms: torch.Tensor) -> torch.Tensor:
        return waveforms


def test_what_cannot_be_a_model(encoder: CmaccEncoder) -> None:
    with pytest.raises(EncoderError, match="encoder _Apart: must have match_video and match_audio"):
        CmaccMTEB(_Apart().eval(), "cmacc/apart")
    with pytest.raises(EncoderError, match="must be in evaluation mode"):
        CmaccMTEB(LogMelStatistics(), "cmacc/statistics")
    with pytest.raises(EncoderError, match="name: must be organization/model, got 'tiny'"):
        CmaccMTEB(encoder, "tiny")
    with pytest.raises(EncoderError, match="windows: must be at least 1, got 0"):
        CmaccMTEB(encoder, "cmacc/tiny", windows=0)


def test_a_missing_mteb_is_named_with_its_extra(encoder: CmaccEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(ImportError, match=r"pip install 'cmacc\[mteb\]'"):
        CmaccMTEB(encoder, "cmacc/tiny")


@FEW
def test_the_command_writes_mtebs_results(
    mteb: Any, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import DatasetDict
    from mteb.abstasks import abstask

    monkeypatch.setattr(abstask, "load_dataset", lambda *_, **__: DatasetDict(train=world))
    tasks = ["--tasks", "ESC50", "HMDB51Classification"]
    assert main(["statistics", *tasks, "--name", "cmacc/statistics", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "skipped, since they need more than audio: HMDB51Classification" in err
    [file] = tmp_path.glob("results/cmacc__statistics/*/ESC50.json")
    [scores] = json.loads(file.read_text())["scores"]["train"]
    assert out.split() == ["ESC50", f"{scores['accuracy']:.4f}"]


def test_bad_input_of_the_command_is_one_line(mteb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statistics", "--tasks", "ESC51", "--out", str(tmp_path)]) == 2
    assert main(["nowhere", "--tasks", "ESC50", "--out", str(tmp_path)]) == 2
    assert main(["statistics", "--tasks", "HMDB51Classification", "--out", str(tmp_path)]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "ESC51" in first
    assert "encoder nowhere: must be a run or export folder" in second
    assert "must have the modalities of a task, got audio for HMDB51Classification" in third
