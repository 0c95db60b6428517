"""Options of the commands that open encoders: consent to run code and to download, and the cache of features."""

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmacc.encoders import EncoderConfig


def add_tower_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-code`` and ``--download``."""
    parser.add_argument("--trust-code", action="store_true", help="run the code that a python: tower names")
    parser.add_argument("--download", action="store_true", help="download what is not in the hub's cache")


def permissions(options: Any) -> AbstractContextManager[None]:
    """Within it, the code of ``python:`` towers may run if ``--trust-code`` was given."""
    from cmacc.encoders import trusting_code

    return trusting_code() if options.trust_code else nullcontext()


def download_towers(config: "EncoderConfig") -> None:
    """Download the towers of an encoder pair that come from the hub."""
    from cmacc.encoders import download_tower

    for name in (config.video, config.audio):
        download_tower(name)


def download_towers_of(run: Path) -> None:
    """Download the towers of a run; other encoders have none to download."""
    from cmacc.pretraining import read_config, run_of

    config = run_of(run) / "config.yaml"
    if config.is_file():
        download_towers(read_config(config).encoder)


def cache_folder() -> Path:
    """The cache folder, by the XDG specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmacc"
