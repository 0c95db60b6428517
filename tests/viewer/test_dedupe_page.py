"""The page of duplicates: pairs side by side with their fate; it needs no network, and takes nothing for markup."""

import re
from pathlib import Path

import numpy as np
import pytest

from cmacc.search.duplicates import Duplicates, Stretch, near_duplicates
from cmacc.search.samples import Samples
from cmacc.viewer import ReportError, render_dedupe_page, write_dedupe_page

from ..clips.films import changing_sound, moving_picture, write_film
from ..search.made import make_index, read
from .test_scan_page import _Addresses, text_of

MARKUP = "<b>&'\".mp4"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """A film of 3 s, its last 2 s, a sound of them, a file that is gone, and others."""
    root = tmp_path_factory.mktemp("films")
    frames, sound = moving_picture(3.0), changing_sound(3.0)
    write_film(root / "film.mp4", frames, sound)
    write_film(root / MARKUP, frames[10:], sound[16_000:])
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2, 3, 16))
    films = {
        "film.mp4": {"video": vectors[0], "audio": vectors[1]},
        MARKUP: {"video": vectors[0, 1:], "audio": vectors[1, 1:]},
        "gone.mp4": {"video": vectors[0, 1:], "audio": vectors[1, 1:]},
        **{f"other {i}.mp4": {"video": rng.standard_normal((9, 16))} for i in range(4)},
    }
    facts = [{"sample_end_seconds": 3.0}, {"sample_end_seconds": 2.0}, {"sample_end_seconds": 2.0}, {}, {}, {}, {}]
    return read(make_index(tmp_path_factory.mktemp("index"), films, root=root, facts=facts))  # type: ignore[arg-type]


def test_pairs_stand_side_by_side_with_times_scores_and_fate(samples: Samples) -> None:
    found = near_duplicates(samples)
    page = render_dedupe_page(samples, found)
    text = text_of(page)
    assert "5 samples to keep of 7 2 samples not to keep 4 s, in 1 group 3 pairs of stretches" in text
    assert "All 3 pairs; the lowest score comes first" in text
    assert "kept film.mp4 0:01.0 to 0:03.0" in text
    assert "not kept gone.mp4 0:00.0 to 0:02.0" in text
    assert "cosine 1.000" in text
    # Of each side a strip of frames and a spectrogram; for the file that is gone, one message.
    assert page.count("data:image/jpeg;base64,") == 2 * 4
    assert page.count('class="gone"') == 2


def test_the_same_moments_are_shown_of_both_sides(samples: Samples) -> None:
    """The film and its part have the same frames, up to their compression."""
    import base64
    import io

    from PIL import Image

    one = Stretch(1, 0, (1.0, 3.0), (0.0, 2.0), 1.0)
    assert samples.names[:2] == [MARKUP, "film.mp4"]
    page = render_dedupe_page(samples, Duplicates(((1, 0),), (one,)))
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.float64)
        for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    ]
    frames = [image for image in images if image.shape == (168, 224, 3)]
    assert len(frames) == 2
    quarters = [frames[0][:84, :112], frames[0][84:, 112:]]
    assert np.abs(frames[0] - frames[1]).mean() < 4
    assert np.abs(quarters[0] - quarters[1]).mean() > 8


def test_at_most_sixty_pairs_are_shown_from_all_scores(samples: Samples) -> None:
    stretches = tuple(Stretch(0, 1, (0.0, 1.0), (0.0, 1.0), 1 - i / 1000) for i in range(500))
    many = Duplicates(((1, 0),), stretches)
    text = text_of(render_dedupe_page(samples, many))
    assert "60 of 500 pairs, evenly spread over all scores" in text
    scores = [float(score) for score in re.findall(r"cosine (\S+)", text)]
    assert len(scores) == 60
    assert scores == sorted(scores)
    assert (scores[0], scores[-1]) == (0.501, 1.0)


def test_nothing_is_alike(samples: Samples) -> None:
    text = text_of(render_dedupe_page(samples, Duplicates((), ())))
    assert "No two stretches are alike." in text
    assert "Groups" not in text


def test_the_page_is_safe_and_needs_no_network(samples: Samples) -> None:
    page = render_dedupe_page(samples, near_duplicates(samples))
    assert MARKUP not in page
    assert "&lt;b&gt;&amp;&#39;&#34;.mp4" in page
    addresses = _Addresses()
    addresses.feed(page)
    assert all(address.startswith(("data:", "#")) for address in addresses.found)


def test_an_existing_page_is_kept(samples: Samples, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    with pytest.raises(ReportError, match=r"exists already; give --overwrite"):
        write_dedupe_page(samples, Duplicates((), ()), out)
    assert write_dedupe_page(samples, Duplicates((), ()), out, overwrite=True).read_text().startswith("<!doctype")
