"""From films to items: that second t's features are of second t of the right film, and which films are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmacc.clips import ClipSpec, ListingError
from cmacc.clips.synthetic import WorldConfig, mux
from cmacc.heads.ave import SECONDS
from cmacc.heads.ave_hdf5 import AveError
from cmacc.heads.event_films import embedded, find_films
from cmacc.pretraining.clip_encoder import EncoderError, Modality
from cmacc.transfer.tasks import TaskError

FORMAT = WorldConfig(frame_size=32, frame_rate_hz=8, sample_rate_hz=8000)
# Film of each row, its interval, and the split; aaa has two rows, as some videos of AVE have.
ROWS = (
    ("aaa", "bark", 0, 10, "train"),
    ("bbb", "bell", 2, 5, "train"),
    ("aaa", "bell", 4, 6, "test"),
    ("ccc", "bark", 0, 0, "val"),
)
LEVELS = {
    "aaa": [20 * (t + 1) for t in range(SECONDS)],
    "bbb": [20 * (SECONDS - t) for t in range(SECONDS)],
    "ccc": [200, 20] * 5,
}


class Levels(nn.Module):
    """How bright the picture is, and how loud the sound is."""

    modalities: tuple[Modality, ...] = ("video", "audio")
    device = torch.device("cpu")

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.spec = ClipSpec(
            frame_count=round(2 * seconds),
            frame_rate_hz=2.0,
            frame_height=16,
            frame_width=16,
            audio_seconds=seconds,
            sample_rate_hz=8000,
        )

    def embed_video(self, frames: Tensor) -> Tensor:
        level = frames.float().mean((1, 2, 3, 4))
        return torch.stack([level, torch.full_like(level, 7.0)], 1)

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return waveforms.square().mean(1, keepdim=True).sqrt()


def write_film(path: Path, levels: list[int], *, seconds: int = SECONDS) -> None:
    """Each second has one grey level, and a tone as loud as the picture is bright, far from clipping."""
    path.parent.mkdir(parents=True, exist_ok=True)
    of_second = np.asarray(levels[:seconds])
    frames = np.broadcast_to(np.repeat(of_second, 8)[:, None, None, None], (8 * seconds, 32, 32, 3)).astype(np.uint8)
    tone = np.sin(2 * np.pi * 500 * np.arange(8000 * seconds) / 8000) * np.repeat(of_second, 8000) / 1024
    mux(np.ascontiguousarray(frames), np.stack([tone, tone], 1).astype(np.float32), path, FORMAT)


def write_lists(folder: Path) -> None:
    lines = {row: f"{event}&{film}&good&{start}&{end}\n" for row, (film, event, start, end, _) in enumerate(ROWS)}
    (folder / "Annotations.txt").write_text("".join(lines.values()))
    for name in ("train", "val", "test"):
        text = "".join(line for row, line in lines.items() if ROWS[row][4] == name)
        (folder / f"{name}Set.txt").write_text(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ave")
    write_lists(folder)
    for number, (name, levels) in enumerate(LEVELS.items()):
        write_film(folder / ("AVE" if number else "elsewhere/deep") / f"{name}.mp4", levels)
    write_film(folder / "AVE" / "unlisted.mp4", LEVELS["aaa"], seconds=2)  # of no row: its length does not matter
    return folder


def copied(root: Path, folder: Path, without: str = "") -> Path:
    for path in root.rglob("*"):
        if path.is_file() and path.stem != without:
            (folder / path.name).hardlink_to(path)
    return folder


def test_the_features_of_a_second_are_of_that_second(root: Path) -> None:
    events = embedded(find_films(root), Levels().eval())
    assert events.rows.tolist() == [0, 1, 2, 3]
    rows = events.items.rows([2, 0, 1, 3])
    assert rows["labels"].tolist() == events.data.labels[[2, 0, 1, 3]].tolist()
    expected = np.asarray([LEVELS[name] for name in ("aaa", "aaa", "bbb", "ccc")], float)
    # Standardised with the training rows, 0 and 1, whose levels are all of 20 to 200, twice.
    expected = (expected - 110) / np.std([20 * (t + 1) for t in range(SECONDS)])
    assert rows["video"].shape == (4, SECONDS, 2)
    np.testing.assert_allclose(rows["video"][..., 0], expected, atol=0.05)  # H.264 is not exact
    np.testing.assert_allclose(rows["video"][..., 1], 0, atol=1e-6)  # constant: only centred
    np.testing.assert_allclose(rows["audio"][..., 0], expected, atol=0.1)  # AAC smears over the edges
    assert events.skipped == {}


def test_windows_longer_than_a_second_are_nearer_to_the_middle(root: Path) -> None:
    """Of L = 4 s, windows start every 6 / 9 s. Levels of bbb fall by 20 a second, so the middles tell the levels."""
    events = embedded(find_films(root), Levels(4.0).eval())
    found = events.items.rows([1])["video"][0, :, 0].double().numpy()
    middles = np.arange(SECONDS) * 6 / 9 + 2
    slope, rest = np.polyfit(middles, found, 1)
    assert slope < 0
    np.testing.assert_allclose(found, slope * middles + rest, atol=0.1)


def test_rows_without_a_film_are_told(root: Path, tmp_path: Path) -> None:
    folder = copied(root, tmp_path, without="ccc")
    with pytest.raises(AveError, match="must be available, got 1 rows without, the first is ccc; allow_partial leaves"):
        find_films(folder)
    events = embedded(find_films(folder, allow_partial=True), Levels().eval())
    assert events.rows.tolist() == [0, 1, 2]
    assert events.split("validation") == []
    assert events.data.facts.unavailable_rows == 1


def test_films_of_another_length_or_without_sound_are_told(root: Path, tmp_path: Path) -> None:
    folder = copied(root, tmp_path, without="bbb")
    write_film(folder / "bbb.mp4", LEVELS["bbb"], seconds=8)
    with pytest.raises(TaskError, match=r"be 10 s long, got 1 that .* bbb.mp4: is 8.0 s long, not 10 s within 0.5 s; "):
        find_films(folder)
    films = find_films(folder, allow_partial=True)
    assert set(films.sample_of) == {"aaa", "ccc"}
    assert films.skipped == {str(folder / "bbb.mp4"): "is 8.0 s long, not 10 s within 0.5 s"}
    (folder / "aaa.mp4").unlink()
    (folder / "aaa.mp4").write_bytes(b"no film")
    with pytest.raises(TaskError, match=r"got 2 that are not so, the first is aaa.mp4: "):
        find_films(folder)
    with pytest.raises(TaskError, match="must hold rows of split train that can be used, got none"):
        embedded(find_films(folder, allow_partial=True), Levels().eval())


def test_rows_of_leaking_films_can_be_dropped(root: Path) -> None:
    events = embedded(find_films(root, drop_leaks=True), Levels().eval())
    assert events.rows.tolist() == [1, 2, 3]
    assert (events.split("train"), events.split("validation"), events.split("test")) == ([0], [2], [1])
    assert events.data.facts.dropped_rows == 1


@pytest.mark.usefixtures("users_checks")
def test_what_encoders_and_folders_must_be(root: Path, tmp_path: Path) -> None:
    films = find_films(root)
    deaf, senseless = Levels().eval(), Levels().eval()
    deaf.modalities, senseless.modalities = ("video",), ()
    with pytest.raises(EncoderError, match="encoder Levels must encode video and audio, got video alone"):
        embedded(films, deaf)
    with pytest.raises(EncoderError, match="must encode video and audio, got neither"):
        embedded(films, senseless)
    with pytest.raises(ListingError, match="must be a folder, got nothing there"):
        find_films(tmp_path / "none")
    write_lists(tmp_path)
    with pytest.raises(TaskError, match=r"must hold films named as their video ids, got none; .* `features`"):
        find_films(tmp_path)
    (tmp_path / "other.mp4").touch()
    with pytest.raises(TaskError, match="must be of a listed row, got 1 films of none"):
        find_films(tmp_path, allow_partial=True)
