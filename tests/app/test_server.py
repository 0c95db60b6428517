"""``cmacc app`` as a process: what it prints, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from cmacc.app.opened import AppError, Opened
from cmacc.app.server import serve

from .conftest import World


def test_a_busy_port_is_an_error_that_names_the_way_out(opened: Opened) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AppError, match=f"--port {port}: must be an address .* not in use.*--port 0 takes a free"):
            serve(opened, port=port)
    with pytest.raises(AppError, match=r"--host 192\.0\.2\.1 .*must be an address of this machine"):
        serve(opened, host="192.0.2.1", port=0)


@pytest.mark.slow
def test_it_prints_its_address_and_ends_cleanly(world: World, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM, while a browser holds a stream open."""
    token = "a-token-of-the-environment"
    environment = os.environ | {"TMPDIR": str(tmp_path), "CMACC_APP_TOKEN": token}
    command = [sys.executable, "-m", "cmacc", "app", str(world.index), "--port", "0"]
    ways = {signal.SIGINT: 130, signal.SIGTERM: 143}
    started = {
        how: subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for how in ways
    }
    try:
        for how, process in started.items():
            assert process.stdout is not None
            too_late = threading.Timer(120, process.kill)
            too_late.start()
            assert process.stdout.readline() == f"opening {world.index} ...\n"
            line = process.stdout.readline()
            too_late.cancel()
            found = re.fullmatch(rf"open (http://127\.0\.0\.1:\d+)/\?token={token}\n", line)
            assert found, line + (process.stderr.read() if process.poll() is not None and process.stderr else "")
            assert {folder.stat().st_mode & 0o777 for folder in tmp_path.glob("cmacc-app-*")} == {0o700}
            with httpx.Client(base_url=found[1], timeout=20, follow_redirects=True) as client:
                assert client.get("/no").status_code == 401
                assert "gradio" in client.get("/", params={"token": token}).text
                with client.stream("GET", "/gradio_api/heartbeat/abc"):
                    process.send_signal(how)
                    out, errors = process.communicate(timeout=30)
            assert process.returncode == ways[how]
            assert token not in out + errors
            assert "refused 127.0.0.1 GET /no: no token" in errors
            assert "Traceback" not in errors
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
    assert not list(tmp_path.glob("cmacc-app-*"))
