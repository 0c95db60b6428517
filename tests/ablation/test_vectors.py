"""The controlled problem: what it promises of its samples, and that views depend on seed, visit and sample alone."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from cmacc.ablation import VectorWorld, draw_vectors
from cmacc.ablation.run import trainer_on
from cmacc.ablation.vectors import VectorBatch, VectorDataset, VectorViews, vector_pair
from cmacc.encoders import EncoderConfig
from cmacc.pretraining import DictionaryConfig, OptimConfig, PretrainConfig, autocast_dtype

SMALL = VectorWorld(classes=10, samples=4000, held_out=500, zipf_exponent=1.0)


def test_classes_have_zipf_frequencies() -> None:
    """Chi-square at significance 1e-6, seed fixed; uniform frequencies are rejected at the same level."""
    data, _ = draw_vectors(SMALL, seed=0)
    found = np.bincount(data.labels.numpy(), minlength=10)
    weights = 1 / np.arange(1, 11)
    assert chisquare(found, weights / weights.sum() * 4000).pvalue > 1e-6
    assert chisquare(found).pvalue < 1e-6


def test_a_seed_is_one_world_and_another_seed_another() -> None:
    again, first = draw_vectors(SMALL, seed=3), draw_vectors(SMALL, seed=3)
    assert all(
        torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio) for a, b in zip(again, first, strict=True)
    )
    assert not torch.equal(draw_vectors(SMALL, seed=4)[0].video, first[0].video)


def test_duplicates_are_near_their_originals_and_as_many_as_asked() -> None:
    world = VectorWorld(classes=10, samples=2000, held_out=300, duplicate_share=0.4)
    data, held_out = draw_vectors(world, seed=1)
    own = torch.arange(2000)
    copies = data.duplicate_of != own
    # Binomial: 2,000 draws at 0.4 have a deviation of 22.
    assert abs(int(copies.sum()) - 800) < 6 * 22
    assert bool((data.duplicate_of[copies] < own[copies]).all())
    origins = data.duplicate_of[copies]
    assert bool((data.duplicate_of[origins] == origins).all()), "a copy of a copy names the first original"
    assert torch.equal(data.labels[copies], data.labels[origins])
    near = (data.video[copies] - data.video[origins]).norm(dim=1)
    strangers = (data.video[copies] - data.video[origins.roll(1)]).norm(dim=1)
    assert near.median() < 0.3 * strangers.median()
    assert torch.equal(held_out.duplicate_of, torch.arange(300))


def test_nothing_is_shared_but_the_latent() -> None:
    """Ridge regression finds the audio's vector in the video's; without a shared cause it finds nothing."""
    from sklearn.linear_model import Ridge

    scores = []
    for latent_weight in (1.0, 0.0):
        world = VectorWorld(classes=2, zipf_exponent=0.0, spread=latent_weight, samples=4000, held_out=500)
        train, test = draw_vectors(world, seed=0)
        # With a spread of zero only the class is shared: taken out, nothing may be left.
        fit = Ridge(1.0).fit(_centred(train.video, train.labels), _centred(train.audio, train.labels))
        scores.append(fit.score(_centred(test.video, test.labels), _centred(test.audio, test.labels)))
    assert scores[0] > 0.1
    assert scores[1] < 0.02


def _centred(rows: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    means = torch.stack([rows[labels == label].mean(0) for label in (0, 1)])
    return (rows - means[labels]).double().numpy()


def test_views_depend_on_sample_and_visit_alone_and_can_be_made_again() -> None:
    data, _ = draw_vectors(SMALL, seed=0)
    views = VectorViews(data, 0.2, 0, torch.device("cpu"))
    batch = VectorBatch(torch.tensor([5, 9, 11]), data.labels[[5, 9, 11]])
    video, audio = views.of(batch, visit=2).values()
    alone, _ = views.of(VectorBatch(torch.tensor([9]), data.labels[[9]]), visit=2).values()
    assert torch.equal(alone[0], video[1])
    assert not torch.equal(views.of(batch, visit=3)["video"], video)
    kept = views.kept(batch, visit=2)
    assert torch.equal(views.again("video", kept.__getitem__), video)
    assert torch.equal(views.again("audio", kept.__getitem__), audio)
    noise = video - data.video[[5, 9, 11]]
    assert 0.1 < noise.std() < 0.3
    assert not torch.equal(noise, audio - data.audio[[5, 9, 11]])


def test_encoders_begin_alike_for_one_seed() -> None:
    config = PretrainConfig(encoder=EncoderConfig(head="linear", embedding_size=8), seed=5)
    first, again = vector_pair(SMALL, config).state_dict(), vector_pair(SMALL, config).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 1}, "VectorWorld: classes must be at least 2, got 1"),
        ({"duplicate_share": 1.0}, r"duplicate_share must be in \[0, 1\), got 1.0"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
    ],
)
def test_knobs_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorWorld(**settings)  # type: ignore[arg-type]


def test_vectors_are_trained_in_float32_also_where_clips_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they always were: bf16 would cost them digits and save no time."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    config = PretrainConfig(
        optim=OptimConfig(batch_size=8), dictionary=DictionaryConfig(selector="active", size=16, pool_size=16)
    )
    assert autocast_dtype(config.precision, torch.device("cpu")) == torch.bfloat16
    trainer = trainer_on(VectorDataset(SMALL, 0, torch.device("cpu")), config, torch.device("cpu"))
    assert trainer.learner.autocast_dtype is None
