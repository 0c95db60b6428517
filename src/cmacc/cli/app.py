"""Look at an index or a run in a browser: ``cmacc app``."""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmacc.cli.encoders import add_tower_flags, download_towers_of, permissions
from cmacc.cli.terminal import command_parser

_SHORTEST_TOKEN = 16


def app_command(arguments: Sequence[str]) -> int:
    """Serve the page of an index or a run."""
    parser = command_parser(
        "app",
        "Open a page of an index, to search in it with a video, a sound, a picture or a recording, and to see a map\n"
        "of it; or of a run, with its curves and its negatives. The page is for this machine alone. With --host,\n"
        "others can open it, and need a token: one is made up and printed, unless --token-file or the environment\n"
        "variable CMACC_APP_TOKEN gives one. The token, and all that is shown, travel unencrypted. Over a network\n"
        "that others use, do without --host, and open a tunnel: ssh -L 7860:localhost:7860 MACHINE",
        "cmacc app videos.index\n"
        "         cmacc app runs/first --port 0 --open\n"
        "         cmacc app videos.index --host 0.0.0.0 --token-file token.txt",
    )
    parser.add_argument("target", metavar="INDEX|RUN", help="index of cmacc embed (folder or URL), or run folder")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen at this address (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0 takes a free one (%(default)s)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="require the token in FILE")
    parser.add_argument("--encoder", help="where the index's encoder is now")
    parser.add_argument(
        "--max-upload-mb", type=float, default=500.0, metavar="MB", help="greatest size of an upload (%(default)g)"
    )
    parser.add_argument(
        "--max-query-minutes",
        type=float,
        default=10.0,
        metavar="MIN",
        help="greatest length of an upload (%(default)g)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser of this machine")
    add_tower_flags(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be 0 to 65535, got {options.port}")
    for flag, value in (("--max-upload-mb", options.max_upload_mb), ("--max-query-minutes", options.max_query_minutes)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{flag} must be above 0, got {value:g}")
    token = _token(options.host, options.token_file)
    # Loading the libraries takes seconds.
    print(f"opening {options.target} ...", flush=True)
    try:
        from cmacc.app import open_target, serve
    except ImportError as error:
        raise ValueError(f"app needs the extra `app`: pip install 'cmacc[app,search]' ({error})") from error

    with permissions(options):
        if options.download and options.encoder:
            download_towers_of(Path(options.encoder))
        opened = open_target(options.target, encoder=options.encoder, download=options.download)
        if options.download and options.encoder is None and opened.run_dir is not None:
            download_towers_of(opened.run_dir)
        serve(
            replace(opened, longest_query_seconds=60 * options.max_query_minutes),
            host=options.host,
            port=options.port,
            token=token,
            max_upload_bytes=int(1e6 * options.max_upload_mb),
            open_browser=options.open,
        )
    return 0


def _token(host: str, file: Path | None) -> str | None:
    """The token that was given, or a new one for an address that other machines reach; None if none is needed."""
    if file is not None:
        try:
            token, whose = file.read_text().strip(), f"--token-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {file}: must be a text file with a token, got {error}") from error
    elif given := os.environ.get("CMACC_APP_TOKEN"):
        token, whose = given.strip(), "CMACC_APP_TOKEN"
    else:
        return None if _is_loopback(host) else secrets.token_urlsafe(24)
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{whose}: must hold a token of at least {_SHORTEST_TOKEN} letters, digits and signs, without spaces, "
            f"got {len(token)} characters"
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
