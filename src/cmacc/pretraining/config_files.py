"""Settings as plain values and as ``config.yaml``: written, and read again, also those of older runs."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import yaml

from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.config_error import ConfigError
from cmacc.pretraining.reading import UnfitError, dataclass_of


def to_plain(config: Any) -> Any:
    """The config as nested dicts of plain values, for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return list(config)
    return str(config) if isinstance(config, Path) else config


def write_config(config: PretrainConfig, path: Path) -> None:
    """Write the config as YAML, with the manifest's absolute path, so that the run can be resumed from any folder."""
    data = dataclasses.replace(config.data, manifest=config.data.manifest.absolute())
    path.write_text(yaml.safe_dump(to_plain(dataclasses.replace(config, data=data)), sort_keys=False))


# Names of settings in cmacc 0.1.0. They are read for one more version, with a warning.
_FORMER_NAMES = {
    "data.max_bad": "data.max_bad_fraction",
    "dictionary.given": "dictionary.initial_centers",
    "dictionary.refresh_store": "dictionary.refresh_device",
}
_FORMER_VALUES = {"dictionary.refresh_store": {"host": "cpu", "device": "accelerator"}}


def present_name(name: str, value: Any) -> tuple[str, Any]:
    """The current dotted name and value of a setting; warns if a former name is used."""
    if name not in _FORMER_NAMES:
        return name, value
    present = _FORMER_NAMES[name]
    warnings.warn(
        f"the setting {name} is now {present}; the former name is read until 0.3", FutureWarning, stacklevel=3
    )
    return present, _FORMER_VALUES.get(name, {}).get(value, value)


def with_present_names(plain: Any) -> Any:
    """Nested settings with current names instead of former ones."""
    if not isinstance(plain, dict):
        return plain
    renamed: dict[str, Any] = {}
    for group, settings in plain.items():
        if not isinstance(settings, dict):
            renamed[group] = settings
            continue
        pairs = (present_name(f"{group}.{name}", value) for name, value in settings.items())
        renamed[group] = {name.rpartition(".")[2]: value for name, value in pairs}
    return renamed


# Older runs do not name these settings: they were made before the settings existed, with this behaviour.
SETTINGS_BEFORE: dict[str, dict[str, Any]] = {
    "encoder": {
        "norm": "batch",
        "frame_pooling": "mean",
        "video_pooling": "own",
        "video_input": "frames",
        "video_map_stride": 16,
    },
    "objective": {"decoupled": False},
}


def read_config(path: Path) -> PretrainConfig:
    """Read a config that `write_config` wrote.

    Raises
    ------
    ConfigError
        The file is missing or not YAML, or a setting is unknown or invalid.
    """
    if not path.is_file():
        raise ConfigError(f"config {path}: no such file; a run folder holds one")
    try:
        plain = yaml.safe_load(path.read_text())
        for group, settings in SETTINGS_BEFORE.items() if isinstance(plain, dict) else ():
            if isinstance(plain.get(group), dict):
                plain[group] = settings | plain[group]
        return config_from_plain(plain)
    except (ConfigError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: {error}") from error


def config_from_plain(plain: Any) -> PretrainConfig:
    """A config from nested dicts, as `to_plain` returns them. Missing settings have their defaults.

    Raises
    ------
    ConfigError
        A setting is unknown or invalid.
    """
    try:
        return dataclass_of(PretrainConfig, with_present_names({} if plain is None else plain), "", with_defaults=True)
    except UnfitError as error:
        raise ConfigError(str(error)) from error
