"""Towers in training: what each mode trains, kept features, checkpoints, evaluation and exports."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cmacc
from cmacc.cli import main
from cmacc.clips import ClipSpec, Manifest, decode_clips, to_video
from cmacc.encoders import AudioVisualEncoder, EncoderConfig, TowerError, open_tower, release, set_trained
from cmacc.encoders.training import _add_lora, parts
from cmacc.pretraining import (
    BatchesConfig,
    CheckpointError,
    ConfigError,
    DictionaryConfig,
    PretrainConfig,
    RunError,
    TrainConfig,
    kept_features,
    last_checkpoint,
    pretrain,
    start_run,
    trained_encoder,
    untrained_encoder,
)
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.cmacc_encoder import CmaccBackbones
from cmacc.pretraining.encoding import _seeded_dropout
from cmacc.pretraining.fitting import fitted_to_towers
from cmacc.pretraining.kept_features import keep_features
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.optimization import build_optimizer
from cmacc.pretraining.run_folder import ROWS_FILE
from cmacc.transfer import ExportError, export_run, open_encoder, read_export

VIDEO = "timm:test_efficientnet"
CPU = torch.device("cpu")
HEADS = TrainConfig(video="head", audio="head")


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A wav2vec2 of random weights with its feature extractor, at 8 kHz."""
    import transformers

    folder = tmp_path_factory.mktemp("speech")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_feat_extract_layers=2,
        conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 4), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for the video tower."""
    torch.manual_seed(2)
    file = tmp_path_factory.mktemp("weights") / "video.safetensors"
    state = open_tower(VIDEO, "video").network.state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return file


@pytest.fixture
def config(small_config: PretrainConfig, audio: str, weights: Path) -> PretrainConfig:
    """Both towers, with frozen backbones."""
    encoder = dataclasses.replace(small_config.encoder, video=f"{VIDEO}={weights}", audio=audio)
    clip = dataclasses.replace(small_config.data.clip, frame_height=160, frame_width=160, sample_rate_hz=8_000)
    data = dataclasses.replace(small_config.data, clip=clip, feature_windows=3)
    return dataclasses.replace(small_config, encoder=encoder, data=data, train=HEADS)


def with_train(config: PretrainConfig, **changes: object) -> PretrainConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@pytest.mark.parametrize(
    ("mode", "trained", "frozen"),
    [
        ("all", ["conv_stem.weight", "blocks.0.0.conv.weight", "bn2.weight"], []),
        ("head", [], ["conv_stem.weight", "bn2.weight"]),
        ("last:1", ["conv_head.weight", "bn2.bias"], ["conv_stem.weight", "blocks.0.0.conv.weight"]),
        ("lora", ["conv_head.lora_A.default.weight"], ["conv_stem.base_layer.weight", "bn2.weight"]),
    ],
)
def test_a_step_changes_only_what_the_mode_trains(
    config: PretrainConfig, mode: str, trained: list[str], frozen: list[str]
) -> None:
    """Gradients, weights and the statistics of batch norms."""
    pair = untrained_encoder(with_train(config, video=mode))
    before = {name: value.clone() for name, value in pair.video.state_dict().items()}
    pair.train()
    optimizer = build_optimizer([pair], dataclasses.replace(config.optim, learning_rate=0.1))
    for _ in range(2):  # adapters start at zero: only their second halves have a gradient at first
        pair(video=torch.randn(4, 3, 2, 32, 32))["video"].embedding[:, 0].sum().backward()
        optimizer.step()
    changed = {name for name, value in pair.video.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"backbone.network.{name}" for name in trained} <= changed
    assert not {f"backbone.network.{name}" for name in frozen} & changed
    assert "last.weight" in changed
    statistics = "backbone.network.bn1" + (".running_mean")
    assert (statistics in changed) == (mode == "all")


def test_parts_are_the_blocks_with_their_norms(audio: str) -> None:
    network = open_tower(VIDEO, "video").network
    blocks = list(network.blocks)  # type: ignore[arg-type]
    assert [part[0] for part in parts(network)] == [network.conv_stem, *blocks, network.conv_head]
    assert [type(module).__name__ for module in parts(network)[-1]] == ["Conv2d", "BatchNormAct2d"]
    speech = open_tower(audio, "audio").network
    assert [part[0] for part in parts(speech)[-2:]] == list(speech.encoder.layers)  # type: ignore[union-attr, arg-type]
    videos = open_tower("torchvision:r3d_18", "video").network
    assert len(parts(videos)) == 1 + 4 * 2


def test_merged_adapters_are_the_same_function(config: PretrainConfig) -> None:
    pair = untrained_encoder(with_train(config, video="lora", audio="lora")).eval()
    for name, parameter in pair.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = {"video": torch.randn(2, 3, 2, 32, 32), "audio": torch.randn(2, 4_000)}
    plain = untrained_encoder(config).eval()
    with torch.inference_mode():
        before, without = pair(**inputs), plain(**inputs)
    release(pair)
    with torch.inference_mode():
        after = pair(**inputs)
    for modality in ("video", "audio"):
        torch.testing.assert_close(after[modality].feature, before[modality].feature, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before[modality].feature, without[modality].feature, atol=1e-3)
    assert pair.state_dict().keys() == plain.state_dict().keys()
    # peft's settings hold sets, whose text differs between processes, and with it the hash of the weights.
    assert not any(hasattr(module, "peft_config") for module in pair.modules())
    assert all(parameter.requires_grad for parameter in pair.parameters())
    assert all(module.training for module in pair.train().modules())


def test_backbones_have_their_own_learning_rate(config: PretrainConfig) -> None:
    pair = untrained_encoder(with_train(config, video="all"))
    groups = build_optimizer([pair], config.optim, config.optim.learning_rate / 10).param_groups
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in pair.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (0.1 if "backbone" in name else 1.0), name
    assert not rates


def test_kept_features_are_the_computed_ones(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every window, against the backbones on clips decoded one by one; the second time, nothing is decoded."""
    monkeypatch.setattr(kept_features, "_FILES_AT_ONCE", 5)
    manifest = Manifest.read(config.data.manifest)
    table = keep_features(manifest, config, CPU, cache=tmp_path)
    pair = untrained_encoder(config).eval()
    spec, ids = config.data.clip, manifest.ids_where(lambda record: record.split == "train")
    for row, sample_id in [(0, ids[0]), (7, ids[7])]:
        record = manifest.records[sample_id]
        last = record.duration_seconds - spec.length_seconds
        clips = list(decode_clips(record.path, [0.0, last / 2, last], spec))
        with torch.inference_mode():
            video = pair.video.backbone(to_video(torch.stack([clip.frames for clip in clips])))
            audio = pair.audio.backbone(torch.stack([clip.waveform for clip in clips]))
        torch.testing.assert_close(table._features["video"][row], video, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(table._features["audio"][row], audio, rtol=1e-4, atol=1e-5)
    # The features do not depend on the seed of the heads.
    other = dataclasses.replace(config, seed=5)
    monkeypatch.setattr(CmaccBackbones, "embed_video", lambda *_: pytest.fail("encoded again"))
    again = keep_features(manifest, other, CPU, cache=tmp_path)
    assert torch.equal(again._features["video"], table._features["video"])


def test_a_visit_takes_one_window_of_both(config: PretrainConfig) -> None:
    manifest = Manifest.read(config.data.manifest)
    table = keep_features(manifest, config, CPU)
    views, batch = table.views(config), table.batch(torch.tensor([3, 8, 20]))
    drawn = set()
    for visit in range(20):
        inputs = views.of(batch, visit)
        windows = [
            [(table._features[m][row] == inputs[m][i]).all(1).nonzero().flatten().tolist() for m in ("video", "audio")]
            for i, row in enumerate(batch.sample_ids)
        ]
        assert all(video == audio and len(video) == 1 for video, audio in windows)
        drawn |= {windows[0][0][0]}
        kept = views.kept(batch, visit)
        assert torch.equal(views.again("audio", kept.__getitem__), inputs["audio"])
    assert drawn == {0, 1, 2}


def test_a_run_of_heads_resumes_evaluates_and_exports(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit by bit as an uninterrupted run, with active batches and a dictionary; without towers in the checkpoints."""
    config = dataclasses.replace(
        config,
        batches=BatchesConfig(selector="active", group_size=2),
        dictionary=DictionaryConfig(selector="active", size=16, pool_size=24, refresh="none"),
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        start_run(config, run)
    pretrain(whole, cache=tmp_path)
    stops = iter([False] * 6 + [True])
    assert not pretrain(cut, should_stop=lambda: next(stops), cache=tmp_path).finished
    assert pretrain(cut, cache=tmp_path).finished
    tensors, others = (load_file(last_checkpoint(run) / "model.safetensors") for run in (whole, cut))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    assert not any("backbone" in name for name in tensors)
    pair, step = trained_encoder(whole, config)
    assert step == 12
    untrained = untrained_encoder(config)
    assert torch.equal(pair.video.network.conv_stem.weight, untrained.video.network.conv_stem.weight)  # type: ignore[union-attr]
    assert not torch.equal(pair.video.last.weight, untrained.video.last.weight)
    arguments = ["evaluate", str(whole), "--data", str(config.data.manifest), "--out", str(whole), "--workers", "0"]
    assert main([*arguments, "--cache", str(tmp_path)]) == 0
    card = json.loads((whole / "card.json").read_text())
    assert {row["metric"] for row in card["results"]} >= {"R@1", "median_rank"}
    assert main(["inspect", str(whole), "--steps", "10"]) == 2
    assert "got a run on kept features, whose choices cannot be replayed yet" in capsys.readouterr().err
    exported = export_run(whole, tmp_path / "export")
    inputs = {"video": torch.randn(2, 3, 4, 64, 64), "audio": torch.randn(2, 8_000)}
    moved = (tmp_path / "export").rename(tmp_path / "elsewhere")
    encoder, pair = cmacc.load(moved).eval(), pair.eval()
    with torch.inference_mode():
        for modality, encoding in encoder(**inputs).items():
            assert torch.equal(encoding.embedding, pair(**inputs)[modality].embedding)
    assert exported.step == 12
    assert open_encoder(str(moved)).untrained is None
    assert str(tmp_path) not in (moved / "config.json").read_text()


def test_other_weights_of_a_frozen_tower_are_refused(config: PretrainConfig, tmp_path: Path, weights: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(weights.read_bytes())
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, video=f"{VIDEO}={own}"))
    start_run(config, tmp_path / "run")
    pretrain(tmp_path / "run", cache=tmp_path)
    tensors = load_file(own)
    tensors["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(tensors, own)
    with pytest.raises(CheckpointError, match=r"the frozen video encoder must have weights with hash .* restore its"):
        trained_encoder(tmp_path / "run", config)


def test_an_export_does_not_reach_outside(config: PretrainConfig, tmp_path: Path) -> None:
    start_run(config, tmp_path / "run")
    pretrain(tmp_path / "run", cache=tmp_path)
    export_run(tmp_path / "run", tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    text = file.read_text()
    for name, reason in (
        ("hf:/etc", "must be hf:audio_tower in an export"),
        ("onnx:../video.onnx", "must be onnx:audio_tower.onnx in an export"),
        ("python:os:getcwd", "--trust-code"),
    ):
        file.write_text(text.replace("hf:audio_tower", name))
        with pytest.raises(ExportError, match=reason):
            read_export(tmp_path / "export")


def test_lora_runs_while_clips_are_decoded(config: PretrainConfig, tmp_path: Path) -> None:
    """Also with one frozen tower, which the key encoders share, and a resumed run."""
    clip = dataclasses.replace(config.data.clip, frame_count=1, frame_height=160)
    config = dataclasses.replace(
        with_train(config, video="lora"),
        data=dataclasses.replace(config.data, clip=clip),
        optim=dataclasses.replace(config.optim, steps=3, warmup_steps=0),
        dictionary=DictionaryConfig(selector="none"),
    )
    start_run(config, tmp_path / "run")
    stops = iter([False, True])
    pretrain(tmp_path / "run", should_stop=lambda: next(stops))
    assert pretrain(tmp_path / "run").finished
    tensors = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert any("lora_A" in name for name in tensors)
    assert not any(name.startswith("encoder.audio.backbone") for name in tensors)
    pair, _ = trained_encoder(tmp_path / "run", config)
    assert not any("lora" in name for name in pair.state_dict())


def test_key_encoders_share_a_frozen_tower(config: PretrainConfig) -> None:
    learner = Learner.build(untrained_encoder(config), ClipViews(config, CPU), config, CPU, None)
    assert isinstance(learner.encoder, AudioVisualEncoder)
    for modality in ("video", "audio"):
        own, key = getattr(learner.encoder, modality), getattr(learner.key_encoder, modality)
        assert key.network is own.network
        assert key.last.weight is not own.last.weight


def test_clips_are_fitted_to_the_towers(config: PretrainConfig, small_config: PretrainConfig) -> None:
    by_default = dataclasses.replace(config, data=dataclasses.replace(config.data, clip=ClipSpec()))
    fitted, changes = fitted_to_towers(by_default)
    assert fitted.data.clip == ClipSpec(frame_height=160, frame_width=160, sample_rate_hz=8_000)
    assert changes == [
        "data.clip.frame_height=160", "data.clip.frame_width=160", "data.clip.sample_rate_hz=8000",
    ]  # fmt: skip
    assert fitted_to_towers(small_config) == (small_config, [])
    wrong = dataclasses.replace(config.data, clip=ClipSpec(frame_height=100))
    with pytest.raises(ConfigError, match=r"data\.clip\.frame_height must be 160 for encoder\.video=timm:.*, got 100"):
        fitted_to_towers(dataclasses.replace(config, data=wrong))


def test_modes_that_do_not_do(config: PretrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.audio must be all, head, lora or last:N .*, got last:0"):
        TrainConfig(audio="last:0")
    with pytest.raises(TowerError, match=r"train\.video must be at most last:7, its parts, got last:99"):
        untrained_encoder(with_train(config, video="last:99"))
    own = AudioVisualEncoder(EncoderConfig(audio="python:cmacc.encoders.towers.packaged:speech_embedding"))
    with pytest.raises(TowerError, match=r"train\.audio must be head, because this tower is frozen, got all"):
        set_trained(own, "audio", "all", 8)


def test_active_batches_need_kept_features(config: PretrainConfig, tmp_path: Path) -> None:
    chosen = dataclasses.replace(config, batches=BatchesConfig(selector="active"))
    with pytest.raises(RunError, match=r"batches\.selector must be random where clips are decoded"):
        start_run(with_train(chosen, video="all"), tmp_path / "run")
    refreshed = dataclasses.replace(chosen.dictionary, selector="active", refresh="selected")
    with pytest.raises(RunError, match=r"dictionary\.refresh must be none with batches\.selector=active"):
        start_run(dataclasses.replace(chosen, dictionary=refreshed), tmp_path / "run")


def test_dropout_stays_off_in_front_of_the_trained_parts(config: PretrainConfig) -> None:
    pair = untrained_encoder(with_train(config, audio="last:1")).train()
    on = [name for name, module in pair.audio.network.named_modules() if module.training]
    assert on
    assert all(name.startswith("encoder.layers.1") for name in on)


def test_adapters_stand_only_on_the_layers_that_get_one() -> None:
    """peft finds layers by the end of their names: `proj` would also be `patch.proj`, a convolution here."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, 4, 3)})
            self.proj = torch.nn.Linear(4, 4)
            self.attention = torch.nn.MultiheadAttention(4, 2)

    network = Network()
    _add_lora(network, 2, "a network")
    assert {name.partition(".lora_")[0] for name, _ in network.named_parameters() if "lora_" in name} == {"proj"}


def test_a_typo_in_a_tower_loses_no_run(config: PretrainConfig, tmp_path: Path) -> None:
    start_run(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    for changes, message in (
        ({"encoder": dataclasses.replace(config.encoder, video=f"{VIDEO}=/no/such.pth")}, "must be a file of weights"),
        ({"train": dataclasses.replace(config.train, video="last:99")}, "must be at most last:7"),
        ({"data": dataclasses.replace(config.data, clip=short_audio(config))}, "as data.clip makes them, got"),
    ):
        with pytest.raises(TowerError, match=message):
            start_run(dataclasses.replace(config, **changes), tmp_path / "run", overwrite=True)
        assert (tmp_path / "run" / "checkpoints").exists()


def short_audio(config: PretrainConfig) -> ClipSpec:
    return dataclasses.replace(config.data.clip, audio_seconds=0.0005)


def test_dropout_is_seeded_by_the_run(config: PretrainConfig) -> None:
    """A trained tower's result does not depend on the global generator, and differs from step to step."""
    config = dataclasses.replace(with_train(config, audio="all"), dictionary=DictionaryConfig(selector="none"))
    learner = Learner.build(untrained_encoder(config), ClipViews(config, CPU), config, CPU, None)

    def drawn(step: int, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with _seeded_dropout(learner, step):
            return torch.rand(3)

    assert torch.equal(drawn(4, 0), drawn(4, 1))
    assert not torch.equal(drawn(4, 0), drawn(5, 0))


def test_features_follow_the_settings_of_the_processor_and_failures_are_tried_again(
    config: PretrainConfig, audio: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(audio.removeprefix("hf:"), tmp_path / "speech")
    encoder = dataclasses.replace(config.encoder, audio=f"hf:{folder}")
    config = dataclasses.replace(config, encoder=encoder, dictionary=DictionaryConfig(selector="none"))
    # Copies of nine files, one of which fails at first.
    manifest = Manifest.read(config.data.manifest)
    records = []
    for i in manifest.ids_where(lambda record: record.split == "train")[:9]:
        record = manifest.records[i]
        copy = tmp_path / f"{i}.mp4"
        copy.write_bytes(Path(record.path).read_bytes())
        records.append(dataclasses.replace(record, path=copy))
    broken = records[4].path
    whole = broken.read_bytes()
    broken.write_bytes(b"no video")
    some, cache = Manifest(records), tmp_path / "cache"
    first = keep_features(some, config, CPU, cache=cache)
    assert (len(first.labels), list(first.bad_files)) == (8, [str(broken)])
    broken.write_bytes(whole)
    encoded = []
    with pytest.MonkeyPatch.context() as patched:
        original = CmaccBackbones.embed_video
        patched.setattr(CmaccBackbones, "embed_video", lambda own, x: (encoded.append(len(x)), original(own, x))[1])
        second = keep_features(some, config, CPU, cache=cache)
    assert (len(second.labels), second.bad_files) == (9, {})
    assert sum(encoded) == config.data.feature_windows  # of the one file
    assert torch.equal(second._features["video"][[0, 1, 2, 3, 5, 6, 7, 8]], first._features["video"])
    assert first.files != second.files
    settings = folder / "preprocessor_config.json"
    plain = json.loads(settings.read_text())
    settings.write_text(json.dumps(plain | {"do_normalize": not plain["do_normalize"]}))
    third = keep_features(some, config, CPU, cache=cache)
    assert not torch.allclose(third._features["audio"], second._features["audio"], atol=1e-4)


def test_a_run_on_kept_features_needs_the_same_files(config: PretrainConfig, tmp_path: Path) -> None:
    start_run(config, tmp_path / "run")
    pretrain(tmp_path / "run", should_stop=lambda: True, cache=tmp_path)
    (tmp_path / "run" / ROWS_FILE).write_text('{"files": "others"}')
    with pytest.raises(RunError, match="the same files must decode as when it began"):
        pretrain(tmp_path / "run", cache=tmp_path)


def test_shuffled_pairs_are_re_encoded_as_they_were(config: PretrainConfig) -> None:
    shuffled = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_pairs=True))
    table = keep_features(Manifest.read(config.data.manifest), shuffled, CPU)
    views, batch = table.views(shuffled), table.batch(torch.tensor([3, 8, 20]))
    inputs, kept = views.of(batch, 1), views.kept(batch, 1)
    for modality in ("video", "audio"):
        assert torch.equal(views.again(modality, kept.__getitem__), inputs[modality])
    assert not torch.equal(inputs["audio"], table.views(config).of(batch, 1)["audio"])
