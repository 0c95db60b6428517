"""``cmacc verify``: the certificate that training is right on this machine."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cmacc.cli.encoders import add_tower_flags, download_towers, permissions
from cmacc.cli.terminal import command_parser, progress_bars

if TYPE_CHECKING:
    from cmacc.pretraining import PretrainConfig
    from cmacc.pretraining.verify.lines import Line

FAILED = 1


def verify_command(arguments: Sequence[str]) -> int:
    """Run the checks, and print them as a table or as JSON; the exit code is 1 if one fails."""
    parser = command_parser(
        "verify",
        "Check that training is right on this machine, with the defaults or with your settings: an interrupted run\n"
        "gives what an uninterrupted one gives, several processes what one gives, and so on (docs/verify.md).\n"
        "The exit code is 1 if a line fails.",
        "cmacc verify --config recipes/real.yaml --processes 4",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with settings of cmacc pretrain, or a run's config.yaml"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="P",
        help="compare 2, 4... processes, up to P, with one (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    from cmacc.pretraining import require_one_process
    from cmacc.pretraining.verify import subject_of, title, verify

    require_one_process()
    config = None if options.config is None else _read(options.config)
    with permissions(options):
        if config is not None:
            if options.download:
                download_towers(config.encoder)
            config = _fitted(config)
        heading = title(subject_of(config, processes=options.processes))
        with progress_bars("verify") as advance:
            lines = verify(config, processes=options.processes, progress=advance)
    passed = all(line.passed is not False for line in lines)
    if options.json:
        # JSON has no NaN; the line's note says what was not a number.
        rows = [dataclasses.asdict(line) | {"difference": _finite(line.difference)} for line in lines]
        print(json.dumps({"subject": heading, "passed": passed, "lines": rows}, indent=1))
    else:
        _print(heading, lines)
    return 0 if passed else FAILED


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _read(path: Path) -> "PretrainConfig":
    from cmacc.pretraining import ConfigError, config_from_plain

    try:
        return config_from_plain(yaml.safe_load(path.read_text()))
    except (ConfigError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error


def _fitted(config: "PretrainConfig") -> "PretrainConfig":
    from cmacc.pretraining.fitting import fitted_to_towers

    return fitted_to_towers(config)[0]


def _print(heading: str, lines: "list[Line]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=heading)
    table.add_column("line")
    table.add_column("compared")
    for name in ("difference", "tolerance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    table.add_column("s", justify="right")
    styles = {True: "green", False: "bold red", None: "yellow"}
    for line in lines:
        found, allowed = ("" if value is None else f"{value:.3g}" for value in (line.difference, line.tolerance))
        result = Text(line.result, style=styles[line.passed])
        table.add_row(line.name, Text(line.compares), found, allowed, result, f"{line.seconds:.1f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
