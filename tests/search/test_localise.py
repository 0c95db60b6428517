"""Heat maps: the occlusion against brute force, places and times against films of known content, files and errors.

Whether real training makes the maps point at what sounds is measured in benchmarks/localise.py, which trains for
minutes. Here an encoder with known weights shows that pictures, places and times are not mixed up.
"""

import importlib
import json
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cmacc.cli import main
from cmacc.clips import ClipSpec, MediaError
from cmacc.encoders import AudioVisualEncoder, EncoderConfig, Modality
from cmacc.encoders.towers import TowerError, open_tower
from cmacc.search import Localisation, localise, write_strip, write_video
from cmacc.search.localise import agreement_and_heat, centre_of_mass
from cmacc.transfer import CmaccEncoder, EncoderError, LogMelStatistics, SpatialEncoder

from ..clips.films import write_film

SPEC = ClipSpec(frame_count=8, frame_rate_hz=4.0, frame_height=64, frame_width=64)


def tiny_encoder(video: str = "tiny") -> CmaccEncoder:
    torch.manual_seed(0)
    pair = AudioVisualEncoder(EncoderConfig(video=video, mel_bins=32, hidden_size=32, embedding_size=16))
    encoder = CmaccEncoder(pair, SPEC, is_grey=False).eval()
    for module in encoder.modules():  # statistics as after training, so that the head's are no identity
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean = 0.1 * torch.rand(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)
    return encoder


class RedIsLoudWithoutMap:
    """An encoder with known weights: red agrees with loud sound."""

    modalities: tuple[Modality, ...] = ("video", "audio")
    spec = SPEC
    device = torch.device("cpu")

    def embed_video(self, frames: Tensor) -> Tensor:
        return redness(frames).mean((1, 2, 3))[:, None]

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return waveforms.square().mean(1, keepdim=True)

    def match_video(self, features: Tensor) -> Tensor:
        return functional.normalize(torch.cat([20 * features, torch.full_like(features, 0.2)], 1))

    def match_audio(self, features: Tensor) -> Tensor:
        return functional.normalize(torch.cat([10 * features, torch.full_like(features, 0.2)], 1))


class RedIsLoud(RedIsLoudWithoutMap):
    """With a map of 8 x 8 places for every frame."""

    def map_video(self, frames: Tensor) -> Tensor:
        return functional.avg_pool2d(redness(frames), 8)[:, None]

    def pool_map(self, feature_map: Tensor) -> Tensor:
        return feature_map.mean((2, 3, 4))


def redness(frames: Tensor) -> Tensor:
    red, green, blue = (frames / 255).unbind(-1)
    return (red - (green + blue) / 2).clamp(min=0)


def red_square(seconds: float, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A red square of a fifth of the height on grey noise, at 16 fps, and its centre as x, y shares ``(T, 2)``.

    It moves around a circle within the middle square of the picture, beside a blue one that stands still.
    """
    rng = np.random.default_rng(0)
    times = np.arange(round(16 * seconds)) / 16
    frames = rng.integers(90, 130, (len(times), height, width, 1), np.uint8).repeat(3, axis=3)
    x = width / 2 + 0.3 * height * np.cos(1.5 * times)
    y = height / 2 + 0.3 * height * np.sin(1.5 * times)
    half = height // 10
    frames[:, half : 3 * half, width // 2 - half : width // 2 + half] = (30, 30, 220)
    for frame, column, row in zip(frames, x.astype(int), y.astype(int), strict=True):
        frame[row - half : row + half, column - half : column + half] = (220, 30, 30)
    return frames, np.stack([x / width, y / height], 1)


def write_red_film(path: Path, seconds: float = 6.0, height: int = 96, width: int = 160) -> NDArray[np.float64]:
    """The red square, loud from second 3 on; returns its centres."""
    frames, centres = red_square(seconds, height, width)
    sound = np.random.default_rng(1).normal(0, 0.3, round(seconds * 16_000)).astype(np.float32)
    sound[: 3 * 16_000] *= 0.02
    write_film(path, frames, sound.clip(-1, 1), fps=16)
    return centres


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float64], Localisation]:
    path = tmp_path_factory.mktemp("films") / "red $quare.mp4"
    centres = write_red_film(path)
    return path, centres, localise(path, RedIsLoud(), hop_seconds=0.5)


def test_the_map_pools_to_the_features() -> None:
    encoder = tiny_encoder()
    assert isinstance(encoder, SpatialEncoder)
    assert not isinstance(LogMelStatistics(), SpatialEncoder)
    frames = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        maps = encoder.map_video(frames)
        assert maps.shape == (2, 192, 4, 4, 4)
        assert torch.equal(encoder.pool_map(maps), encoder.embed_video(frames))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (512, 2, 2, 3)),
        ("mobilenet_v3_small", (576, 2, 2, 3)),
        ("regnet_y_400mf", (440, 2, 2, 3)),
        ("efficientnet_b0", (1280, 2, 2, 3)),
        ("swin_t", (768, 2, 2, 3)),
        ("r3d_18", (512, 1, 4, 6)),
    ],
)
def test_torchvisions_map_pools_to_its_own_features(name: str, shape: tuple[int, ...]) -> None:
    """Torchvision's own ``forward`` knows nothing of our two parts."""
    tower = open_tower(f"torchvision:{name}", "video").eval()
    assert tower.has_feature_map
    inputs = torch.randn(1, 3, 2, 64, 96)
    with torch.no_grad():
        feature_map = tower.feature_map(inputs)
        assert feature_map.shape == (1, *shape)
        assert torch.allclose(tower.pool(feature_map), tower(inputs), atol=1e-6)


def test_towers_without_a_map_say_which_have_one() -> None:
    tower = open_tower("torchvision:shufflenet_v2_x0_5", "video").eval()
    assert not tower.has_feature_map
    with pytest.raises(TowerError, match=r"tower torchvision:shuf.*: must have a feature map that it pools, got none"):
        tower.feature_map(torch.zeros(1, 3, 2, 32, 32))
    encoder = tiny_encoder("torchvision:shufflenet_v2_x0_5")
    with pytest.raises(EncoderError, match=r"video torchvision:shuf.*: must have a feature map .* resnet, resnext"):
        encoder.map_video(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8))


def test_heat_is_what_the_agreement_loses() -> None:
    """Against loops over blocks and the pooling and head written out, in float64."""
    encoder = tiny_encoder()
    frames = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    waveforms = 0.1 * torch.randn(2, 32_000)
    agreement, heat = agreement_and_heat(encoder, frames, waveforms)
    assert heat.shape == (2, 4, 4, 4)
    state = {name: value.double().numpy() for name, value in encoder.pair.video.state_dict().items()}
    with torch.no_grad():
        maps = encoder.map_video(frames).double().numpy()
        heard = encoder.match_audio(encoder.embed_audio(waveforms)).double().numpy()

    def agrees(feature_map: NDArray[np.float64], sound: NDArray[np.float64]) -> float:
        pooled = (feature_map.max((2, 3)) + feature_map.mean((2, 3))).repeat(2, axis=1).ravel()  # 4 times in 8 bins
        hidden = np.maximum(state["hidden.0.weight"] @ pooled + state["hidden.0.bias"], 0)
        standard = (hidden - state["hidden.2.running_mean"]) / np.sqrt(state["hidden.2.running_var"] + 1e-5)
        seen = state["last.weight"] @ (standard * state["hidden.2.weight"] + state["hidden.2.bias"])
        return float(seen @ sound / np.linalg.norm(seen))

    for clip in range(2):
        whole = agrees(maps[clip], heard[clip])
        assert agreement[clip].item() == pytest.approx(whole, abs=1e-5)
        for time, row, column in ((0, 0, 0), (1, 2, 1), (3, 3, 3), (2, 0, 3)):
            lost = []
            for top in (row - 1, row):
                for left in (column - 1, column):
                    without = maps[clip].copy()
                    for y in (top, top + 1):
                        for x in (left, left + 1):
                            if 0 <= y < 4 and 0 <= x < 4:
                                without[:, time, y, x] = 0
                    lost.append(whole - agrees(without, heard[clip]))
            assert heat[clip, time, row, column].item() == pytest.approx(np.mean(lost), abs=1e-5)
    assert heat.abs().max() > 1e-3


def test_heat_does_not_depend_on_how_many_maps_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder()
    frames, waveforms = torch.randint(0, 256, (1, 8, 64, 64, 3), dtype=torch.uint8), 0.1 * torch.randn(1, 32_000)
    _, whole = agreement_and_heat(encoder, frames, waveforms)
    module = importlib.import_module("cmacc.search.localise")  # the package has a function of this name
    monkeypatch.setattr(module, "_MAPS_AT_ONCE_BYTES", 3 * 192 * 64 * 4)
    _, parts = agreement_and_heat(encoder, frames, waveforms)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_the_heat_follows_what_sounds_through_the_picture(
    red: tuple[Path, NDArray[np.float64], Localisation],
) -> None:
    """In a wide film, of which the encoder sees the middle: by place and by time, within a place of its map."""
    _, centres, found = red
    assert (found.picture_height, found.picture_width) == (96, 160)
    assert found.view == pytest.approx((0, 0.2, 1, 0.6))
    assert found.start_seconds.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert found.heat.shape == (9, 8, 8, 8)
    _, left, _, width = found.view
    for frame in range(16 * 4, 16 * 6):
        x, y = centre_of_mass(found.heat_at((frame + 0.5) / 16))
        assert abs(left + x * width - centres[frame, 0]) * 160 < 12
        assert abs(y - centres[frame, 1]) * 96 < 12
    # Where there is hardly any sound, the red square is what disagrees with it.
    assert found.heat[:2].max() <= 1e-6
    assert found.agreement[:2].max() < 0.5 < 0.9 < found.agreement[-2:].min()


def test_moments_are_the_best_windows_apart(red: tuple[Path, NDArray[np.float64], Localisation]) -> None:
    _, centres, found = red
    moments = found.moments(9)
    scores = [moment.agreement for moment in moments]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(float(found.agreement.max()))
    spans = sorted((moment.start_seconds, moment.end_seconds) for moment in moments)
    assert all(end - start == pytest.approx(2) for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    # None could be added: every window overlaps one of them.
    assert all(any(abs(start - begin) < 2 for begin, _ in spans) for start in found.start_seconds)
    assert moments[0].start_seconds >= 2.5
    during = centres[round(16 * moments[0].start_seconds) : round(16 * moments[0].end_seconds)]
    assert np.abs(during - (moments[0].x, moments[0].y)).max(1).min() < 0.1
    with pytest.raises(ValueError, match="moments: top must be at least 1, got 0"):
        found.moments(0)


def test_a_part_and_a_short_file(tmp_path: Path, red: tuple[Path, NDArray[np.float64], Localisation]) -> None:
    path, _, found = red
    part = localise(path, RedIsLoud(), begin_seconds=3.0, end_seconds=5.25)
    assert part.start_seconds.tolist() == [3, 3.25]
    assert part.agreement[0] == pytest.approx(found.agreement[6], abs=1e-6)
    assert np.allclose(part.heat[0], found.heat[6], atol=1e-6)
    write_red_film(tmp_path / "short.mp4", seconds=1.0)
    short = localise(tmp_path / "short.mp4", RedIsLoud())
    assert short.start_seconds.tolist() == pytest.approx([-0.5], abs=0.05)
    [moment] = short.moments()
    assert (moment.start_seconds, moment.end_seconds) == pytest.approx((0, 1), abs=0.05)
    with pytest.raises(ValueError, match=r"must lie in its 6\.\d+ s, got 9 to 10 s"):
        localise(path, RedIsLoud(), begin_seconds=9.0, end_seconds=10.0)
    with pytest.raises(ValueError, match=r"hop_seconds must be in \(0, 2\], the length of a window, got 0"):
        localise(path, RedIsLoud(), hop_seconds=0.0)


def test_a_film_on_its_side_is_drawn_as_it_is_displayed(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 96, 48, "yuv420p"
        video.set_display_rotation(90)
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        for _ in range(24):
            picture = np.full((48, 96, 3), 60, np.uint8)
            picture[:, :24] = (220, 30, 30)  # left as stored: after a quarter turn, the top or the bottom
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        noise = np.random.default_rng(0).normal(0, 0.3, (1, 48_000)).clip(-1, 1).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*video.encode(None), *sound.encode(frame), *sound.encode(None)):
            container.mux(packet)
    found = localise(path, RedIsLoud())
    assert (found.picture_height, found.picture_width) == (96, 48)
    # The encoder sees the middle half of the height, and of the red quarter nothing.
    assert found.view == pytest.approx((0.25, 0, 0.5, 1))
    assert found.heat.max() == pytest.approx(0, abs=1e-3)
    write_video(found, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as film:
        shown = next(film.decode(video=0)).to_ndarray(format="rgb24")[..., 0].astype(float)
    assert shown.shape == (480, 240)
    assert sorted(shown[[40, 440]].mean(1).round(-1)) == [30, 40]  # darkened: grey of 60, and of red


def test_the_strip_and_the_video_show_the_heat(
    tmp_path: Path, red: tuple[Path, NDArray[np.float64], Localisation]
) -> None:
    path, centres, found = red
    write_strip(found, tmp_path / "out" / "strip.png", top=2)
    with Image.open(tmp_path / "out" / "strip.png") as image:
        assert image.format == "PNG"
        assert image.width > 800
        assert image.height > 400
    write_video(found, tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as film:
        video, audio = film.streams.video[0], film.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in film.decode(video)]
        film.seek(0)
        sound = np.concatenate([frame.to_ndarray()[0] for frame in film.decode(audio)])
    assert len(frames) == 96
    assert frames[0].shape == (240, 400, 3)
    assert abs(len(sound) / 48_000 - 6) < 0.05
    loud, quiet = np.abs(sound[4 * 48_000 : 5 * 48_000]).mean(), np.abs(sound[: 2 * 48_000]).mean()
    assert loud > 20 * quiet
    for frame in (70, 80, 90):  # colour means heat: the picture itself is grey, and the square's middle is painted
        colour = np.ptp(frames[frame], axis=2)
        y, x = np.unravel_index(colour.argmax(), colour.shape)
        assert abs(x / 400 - centres[frame, 0]) < 0.15
        assert abs(y / 240 - centres[frame, 1]) < 0.2
        assert np.median(colour) < 12
    assert np.ptp(frames[8], axis=2).max() < 40  # hardly any sound, no heat
    part = localise(path, RedIsLoud(), begin_seconds=3.5, end_seconds=6.0)
    write_video(part, tmp_path / "part.mp4")
    with av.open(str(tmp_path / "part.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 40


def test_no_file_is_replaced_unasked(
    tmp_path: Path, red: tuple[Path, NDArray[np.float64], Localisation], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, found = red
    for write, name in ((write_strip, "a.png"), (write_video, "a.mp4")):
        (tmp_path / name).write_text("precious")
        with pytest.raises(FileExistsError, match=rf"{name} exists; choose another --out, or give --overwrite"):
            write(found, tmp_path / name)
        with pytest.raises(FileExistsError, match="is the video itself"):
            write(found, path, overwrite=True)

        def fail(*_: object) -> None:
            raise RuntimeError("no")

        with monkeypatch.context() as patch:
            patch.setattr("cmacc.search.heat_pictures.decode_clips", fail)
            with pytest.raises(RuntimeError):
                write(found, tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "a.png"]


def test_files_and_encoders_that_cannot_be_localised(tmp_path: Path) -> None:
    frames, _ = red_square(1.0, 48, 64)
    write_film(tmp_path / "silent.mp4", frames, None)
    write_film(tmp_path / "blind.m4a", None, np.zeros(16_000, np.float32))
    with pytest.raises(MediaError, match=r"silent\.mp4: must have sound and picture to compare, got no sound"):
        localise(tmp_path / "silent.mp4", RedIsLoud())
    with pytest.raises(MediaError, match=r"blind\.m4a: must have sound and picture to compare, got no picture"):
        localise(tmp_path / "blind.m4a", RedIsLoud())
    with pytest.raises(EncoderError, match=r"LogMelStatistics: must encode video and audio into .*got audio alone"):
        localise(tmp_path / "silent.mp4", LogMelStatistics())

    with pytest.raises(EncoderError, match=r"RedIsLoudWithoutMap: must give the feature map .*map_video and pool_map"):
        localise(tmp_path / "silent.mp4", RedIsLoudWithoutMap())

    class Broken(RedIsLoud):
        def match_audio(self, features: Tensor) -> Tensor:
            return super().match_audio(features) * float("nan")

    write_red_film(tmp_path / "red.mp4", seconds=1.0)
    with pytest.raises(EncoderError, match=r"Broken: must give finite vectors, got NaN or infinity for .*red\.mp4"):
        localise(tmp_path / "red.mp4", Broken())


def test_the_command_writes_both_files_and_tells_the_moments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_red_film(tmp_path / "red.mp4", seconds=4.5)
    command = ["localise", str(tmp_path / "red.mp4"), "random"]
    out = ["--out", str(tmp_path / "found" / "red.1")]
    assert main([*command, *out, "--top", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [sorted(moment) for moment in told] == [["agreement", "end_seconds", "path", "start_seconds", "x", "y"]] * 2
    assert abs(told[0]["start_seconds"] - told[1]["start_seconds"]) >= 2
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["red.1.mp4", "red.1.png"]
    assert main([*command, *out]) == 2
    assert "exists; choose another --out, or give --overwrite" in capsys.readouterr().err
    assert main([*command, *out, "--overwrite", "--at", "2.5"]) == 0
    assert "1.5 to 3.5 s: agreement" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "red"), "--overwrite"]) == 2
    assert "must not name FILE itself" in capsys.readouterr().err
    with av.open(str(tmp_path / "red.mp4")) as film:
        assert film.streams.video[0].frames == 72


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["random", "--top", "0"], "--top must be at least 1, got 0"),
        (["random", "--window", "7", "9"], "the part to localise must lie in its 1.0"),
        (["statistics"], "encoder LogMelStatistics: must encode video and audio"),
        (["nowhere/run"], "encoder nowhere/run: must be a folder or in the Hugging Face hub"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_red_film(tmp_path / "red.mp4", seconds=1.0)
    assert main(["localise", str(tmp_path / "red.mp4"), *arguments, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert error in told[-1]
    assert not list(tmp_path.glob("out*"))
