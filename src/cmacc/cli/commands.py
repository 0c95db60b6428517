"""``cmacc COMMAND``: dispatches to a command, and turns its errors into one line and an exit code.

A command parses its arguments, calls one function (`demo` calls five), and prints the result. Heavy imports are inside
the commands, so that ``cmacc --help`` is fast.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from cmacc.cli.ablation import ablate_command
from cmacc.cli.app import app_command
from cmacc.cli.curate import dedupe_command, select_command
from cmacc.cli.data import pack_command, scan_command
from cmacc.cli.demo import demo_command
from cmacc.cli.evaluate import evaluate_command
from cmacc.cli.results import export_command, inspect_command, report_command
from cmacc.cli.search import embed_command, localise_command, search_command
from cmacc.cli.terminal import BAD_INPUT, INTERRUPTED, print_error
from cmacc.cli.training import pretrain_command
from cmacc.cli.verify import verify_command

_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "scan": ("examine folders of videos and write a manifest", scan_command),
    "pack": ("transcode a manifest's files into shards that are fast to read", pack_command),
    "pretrain": ("train encoders on a manifest", pretrain_command),
    "verify": ("check that training is right on this machine", verify_command),
    "evaluate": ("measure an encoder and write a result card; compare cards", evaluate_command),
    "report": ("write a run's report as an HTML page", report_command),
    "inspect": ("show which negatives a run chose, beside random ones", inspect_command),
    "ablate": ("run the variants of a plan and compare them", ablate_command),
    "export": ("export a run's encoders: weights, config, model card, ONNX", export_command),
    "embed": ("embed whole videos into an index to search", embed_command),
    "search": ("find moments in an index by a video, sound, image or text", search_command),
    "localise": ("show where in the picture a file's sound is, and when", localise_command),
    "select": ("choose samples of an index that differ, to label or to keep", select_command),
    "dedupe": ("find duplicates in an index, and list what to keep", dedupe_command),
    "app": ("look at an index or a run in a browser, and search", app_command),
    "demo": ("run the main steps on a synthetic world", demo_command),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    The exit code is 0 on success, 2 for bad input, 130 for Ctrl-C; of ``pretrain`` also 75 after SIGTERM, and 69 if
    another process of the run died.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    overview = argparse.ArgumentParser(
        prog="cmacc",
        description="Learn video and audio representations from unlabelled video.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {summary}" for name, (summary, _) in _COMMANDS.items())
        + "\n\n`cmacc COMMAND --help` shows the arguments of a command, with an example.\n"
        "With --debug, errors are shown with their traceback.\n\n"
        "exit codes: 0 success, 2 bad input, 130 Ctrl-C; of pretrain also 75 stopped by SIGTERM and saved, 69 another "
        "process\nof the run died",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"cmacc {version('cmacc')}")
    overview.add_argument("command", choices=_COMMANDS, metavar="COMMAND")
    # Only the first word is parsed here: building every command's parser would import everything.
    command = overview.parse_args(arguments[:1]).command
    try:
        return _COMMANDS[command][1](arguments[1:])
    except (ValueError, OSError) as error:
        if debug:
            raise
        print_error(f"cmacc {command}: error: {' '.join(str(error).split())}")
        return BAD_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        print_error(f"cmacc {command}: interrupted")
        return INTERRUPTED
    finally:
        _remove_empty_cache_of_torch()


def _remove_empty_cache_of_torch() -> None:
    # torch makes a folder for its compiler's cache as soon as the compiler is imported, which every optimizer does.
    if "torch" in sys.modules and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        for folder in Path(tempfile.gettempdir()).glob("torchinductor_*"):
            with suppress(OSError):  # in use, or another user's
                folder.rmdir()
