"""A replayed selection is the run's own, key for key."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmacc.clips import Manifest
from cmacc.negatives import KeyQueue
from cmacc.pretraining import DictionaryConfig, ObjectiveConfig, PretrainConfig, pretrain, start_run
from cmacc.pretraining.config import PrecisionName
from cmacc.viewer.replay import ReplayError, SelectionReplay

STEPS = 8


def trained(config: PretrainConfig, run_dir: Path, **dictionary: object) -> Path:
    config = dataclasses.replace(
        config,
        dictionary=DictionaryConfig(
            **({"selector": "active", "size": 16, "pool_size": 24, "refresh": "none"} | dictionary)
        ),  # type: ignore[arg-type]
        optim=dataclasses.replace(config.optim, steps=STEPS),
        save_every=1,
        keep_every=1,
    )
    start_run(config, run_dir)
    assert pretrain(run_dir).finished
    return run_dir


@pytest.fixture(scope="module")
def run_dir(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    online = dataclasses.replace(small_config, objective=ObjectiveConfig(batch_keys="online"))
    return trained(online, tmp_path_factory.mktemp("replay") / "run")


def saved_dictionary(run_dir: Path, modality: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample ids and embeddings of a checkpoint's dictionary, oldest first."""
    tensors = load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    prefix = f"{modality}_dictionary.dictionary."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    queue = KeyQueue(*state["embedding"].shape, state["penultimate"].shape[1])
    queue.load_state_dict(state)
    return queue.keys().sample_ids, queue.keys().embedding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("fp32", {}),
        ("bf16", {"gradient": "key"}),
        ("fp32", {"selector": "random", "allow_repeats": True}),
        ("fp32", {"selector": "newest"}),
        ("fp32", {"selector": "hardest", "pseudo_labels": "within_modal", "refresh": "selected"}),
        ("fp32", {"initial_centers": "dictionary", "gradient": "key", "select_every": 2}),
    ],
    ids=str,
)
def test_replayed_choice_is_what_the_run_took_in(
    small_config: PretrainConfig, tmp_path: Path, precision: PrecisionName, settings: dict[str, object]
) -> None:
    config = dataclasses.replace(small_config, objective=ObjectiveConfig(batch_keys="momentum"), precision=precision)
    if precision == "bf16":
        # With four frames the last convolution sees two moments, and oneDNN's gradient then holds NaN now and then on
        # CPUs with AVX512-BF16 but no AMX: it reads memory that nobody wrote.
        # Small, because bf16 without units for it is slow.
        clip = dataclasses.replace(
            config.data.clip, frame_count=8, frame_rate_hz=8.0, frame_height=16, frame_width=16, audio_seconds=0.5
        )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, clip=clip))
    run = trained(config, tmp_path / "run", **settings)
    replay = SelectionReplay(run)
    every = replay.config.dictionary.select_every
    assert replay.steps == [step for step in range(1, STEPS + 1) if step % every == 0]
    compared = 0
    for step in replay.steps[:-1]:
        for selection in replay.at(step):
            ids, embedding = saved_dictionary(run, selection.modality, step + 1)
            assert torch.equal(selection.dictionary.sample_ids, ids)
            if settings.get("refresh") is None:
                assert torch.equal(selection.dictionary.embedding, embedding)
            assert torch.equal(selection.before.sample_ids, saved_dictionary(run, selection.modality, step)[0])
            assert selection.eligible[selection.chosen].all()
            within = settings.get("pseudo_labels") == "within_modal"
            assert (selection.query_modality == selection.modality) == within
            assert torch.equal(selection.queries, selection.contrasted) != within
            compared += len(selection.chosen)
    assert compared >= 2 * 8 * (len(replay.steps) - 2)


def test_replay_leaves_run_and_global_randomness_alone(run_dir: Path) -> None:
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    before = torch.get_rng_state()
    audio, video = SelectionReplay(run_dir).at(STEPS)  # the run's end: the next step's batch was never trained on
    assert torch.equal(torch.get_rng_state(), before)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == files
    assert (audio.modality, video.modality) == ("audio", "video")
    assert audio.contrasted is not video.contrasted
    assert torch.equal(audio.contrasted, video.positives)  # online keys: one modality's query is the other's right key
    assert len(audio.pool) == 24
    assert audio.pool.steps.max() == STEPS - 1


def test_start_is_that_of_the_batch_which_the_key_came_from(run_dir: Path) -> None:
    replay = SelectionReplay(run_dir)
    keys = replay.at(STEPS)[0].pool
    requests = {(r.sample_id, step): r.start_seconds for step in range(STEPS) for r in replay.plan.requests(step)}
    for sample_id, step in zip(keys.sample_ids.tolist(), replay.encoded_at(keys).tolist(), strict=True):
        assert replay.start_seconds(sample_id, step) == requests[sample_id, step]
    again = dataclasses.replace(keys, steps=torch.full_like(keys.steps, 99), handles=8 * keys.steps + 3)
    assert torch.equal(replay.encoded_at(again), keys.steps)


def test_default_steps_are_spread_and_end_with_the_last(run_dir: Path) -> None:
    replay = SelectionReplay(run_dir)
    assert replay.default_steps() == [1, 4, 6, 8]
    assert replay.default_steps(1) == [8]
    replay.steps = [20, 40]
    assert replay.default_steps() == [20, 40]


def test_what_cannot_be_replayed_is_said(run_dir: Path, small_config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"must be a folder made by `cmacc pretrain`, got nothing there"):
        SelectionReplay(tmp_path / "nothing")
    with pytest.raises(ReplayError, match=r"steps: must be among .* \(1, 2, .*8\), got 11; .*--keep_every"):
        SelectionReplay(run_dir).at(11)
    start_run(small_config, tmp_path / "fresh")
    with pytest.raises(ReplayError, match=r"must hold a checkpoint in .*, got none; train it first"):
        SelectionReplay(tmp_path / "fresh")
    (tmp_path / "fresh" / "checkpoints" / "step-00000003").mkdir(parents=True)
    dictionary = dataclasses.replace(small_config.dictionary, select_every=2)
    start_run(dataclasses.replace(small_config, dictionary=dictionary), tmp_path / "fresh", overwrite=True)
    (tmp_path / "fresh" / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(ReplayError, match=r"at a multiple of dictionary.select_every \(2\).*, got 3"):
        SelectionReplay(tmp_path / "fresh")
    none = dataclasses.replace(small_config, dictionary=DictionaryConfig(selector="none"))
    start_run(none, tmp_path / "none")
    (tmp_path / "none" / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(ReplayError, match=r"dictionary.selector must be active, .* got none; its only negatives"):
        SelectionReplay(tmp_path / "none").at(3)


def test_another_manifest_is_noticed(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    replay = SelectionReplay(run_dir)
    records = list(Manifest.read(small_world).records)
    replay.plan = dataclasses.replace(replay.plan, seed=7, sample_ids=replay.plan.sample_ids[20:])
    with pytest.raises(ReplayError, match=r"manifest .*: must be as it was when run .* was trained"):
        replay.at(STEPS)
    replay = SelectionReplay(run_dir)
    replay.manifest = Manifest(records[:2])
    with pytest.raises(ReplayError, match=r"manifest .*: must be as it was"):
        replay.at(STEPS)
