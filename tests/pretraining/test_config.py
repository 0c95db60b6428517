from pathlib import Path

import pytest
import yaml

from cmacc.pretraining import (
    ConfigError,
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    config_from_plain,
    read_config,
)
from cmacc.pretraining.config_files import write_config


def test_what_is_written_is_read_again(small_config: PretrainConfig, tmp_path: Path) -> None:
    write_config(small_config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == small_config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataConfig(max_bad_fraction=1.5), r"data.max_bad_fraction must be in \[0, 1\], got 1.5"),
        (lambda: DataConfig(workers=-1), "data.workers must be at least 0, got -1"),
        (lambda: DataConfig(clips_per_video=0), "data.clips_per_video must be at least 1, got 0"),
        (lambda: DictionaryConfig(selector="active", size=0), "dictionary.size must be at least 1, got 0"),
        (lambda: ObjectiveConfig(temperature=0.0), "objective.temperature must be positive, got 0.0"),
        (lambda: ObjectiveConfig(momentum=1.1), r"objective.momentum must be in \[0, 1\], got 1.1"),
        (lambda: DictionaryConfig(select_every=0), "dictionary.select_every must be at least 1, got 0"),
        (lambda: DictionaryConfig(refresh_every=0), "dictionary.refresh_every must be at least 1, got 0"),
        (
            lambda: OptimConfig(steps=50, warmup_steps=50),
            r"optim.warmup_steps must be .* below optim.steps \(50\), .*50",
        ),
        (
            lambda: PretrainConfig(dictionary=DictionaryConfig(selector="active", warmup_steps=1000)),
            r"dictionary.warmup_steps must be below optim.steps \(1000\), .* got 1000",
        ),
        (lambda: OptimConfig(batch_size=1), "optim.batch_size must be at least 2, got 1"),
        (
            lambda: PretrainConfig(dictionary=DictionaryConfig(selector="active", size=16)),
            r"dictionary.size must be at least optim.batch_size times dictionary.select_every \(32\), got 16",
        ),
        (
            lambda: PretrainConfig(dictionary=DictionaryConfig(selector="active", size=64, select_every=3)),
            r"dictionary.size must be at least .* \(96\), got 64",
        ),
        (
            lambda: PretrainConfig(dictionary=DictionaryConfig(selector="active", pool_size=64, select_every=3)),
            r"dictionary.pool_size must be at least .* \(96\), got 64",
        ),
        (
            lambda: DictionaryConfig(selector="random", initial_centers="dictionary"),
            "dictionary.initial_centers must be none for another dictionary.selector than active, got dictionary",
        ),
        (
            lambda: PretrainConfig(
                dictionary=DictionaryConfig(selector="none"), objective=ObjectiveConfig(in_batch=False)
            ),
            "objective.in_batch must be true where dictionary.selector is none",
        ),
    ],
)
def test_settings_that_cannot_be(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"batch_size": "many"}}, "batch_size"),
        ({"optim": {"no_such_setting": 1}}, "no_such_setting"),
        ({"dictionary": {"selector": "best"}}, "selector"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_a_file_with_a_wrong_setting_names_it(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        read_config(tmp_path / "config.yaml")


def test_the_warm_up_of_a_short_run_is_short_unless_it_is_given() -> None:
    assert [OptimConfig(steps=steps).warmup for steps in (4, 100, 200, 5000)] == [1, 25, 50, 50]
    assert OptimConfig(steps=100, warmup_steps=90).warmup == 90


def test_defaults_follow_the_evidence() -> None:
    """No dictionary; where there is one, keys of the positive's own kind, none as old as the pool is deep."""
    assert PretrainConfig().dictionary.selector == "none"
    assert PretrainConfig().objective.decoupled
    assert PretrainConfig().encoder.norm == "group"
    assert {
        s: PretrainConfig(dictionary=DictionaryConfig(selector=s)).batch_keys for s in ("none", "newest", "active")
    } == {"none": "online", "newest": "both", "active": "both"}
    chosen = PretrainConfig(objective=ObjectiveConfig(batch_keys="momentum"))
    assert chosen.batch_keys == "momentum"
    assert {s: DictionaryConfig(selector=s).refresh_policy for s in ("active", "random", "newest", "none")} == {
        "active": "selected", "random": "selected", "newest": "none", "none": "none",
    }  # fmt: skip
    for recipe in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        settings = config_from_plain(yaml.safe_load(recipe.read_text()))
        if recipe.stem == "paper":
            continue
        has_dictionary = settings.dictionary.selector != "none"
        assert not has_dictionary or settings.batch_keys == "both", recipe
        assert not has_dictionary or settings.dictionary.refresh_policy == "selected", recipe


def test_former_names_are_read_with_a_warning(tmp_path: Path) -> None:
    dictionary = {"selector": "active", "given": "dictionary", "refresh_store": "device"}
    former = {"data": {"max_bad": 0.3}, "dictionary": dictionary}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(former))
    with pytest.warns(FutureWarning) as warned:
        config = read_config(tmp_path / "config.yaml")
    assert len(warned) == 3
    assert "the setting data.max_bad is now data.max_bad_fraction" in {
        str(one.message).partition(";")[0] for one in warned
    }
    assert config.data.max_bad_fraction == 0.3
    assert (config.dictionary.initial_centers, config.dictionary.refresh_device) == ("dictionary", "accelerator")


def test_an_exponent_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {learning_rate: 1e-3}")
    assert read_config(tmp_path / "config.yaml").optim.learning_rate == 1e-3
