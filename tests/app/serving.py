"""A small page of gradio behind the guard, served on a free port by a thread of this process."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cmacc.app.server import mount, server_of

MAX_UPLOAD_BYTES = 2_000_000
SECRET = "/etc/secret-place"


@dataclass(frozen=True)
class Served:
    """The page: ``functions`` are the numbers of its functions by name."""

    host: str
    uploads: Path
    functions: dict[str, int]

    @property
    def address(self) -> str:
        return f"http://{self.host}"


def small_page() -> Any:
    """Functions: ``read`` (size and beginning of a file), ``fail``, ``refuse`` (with a message for visitors)."""
    import gradio as gr

    def read(path: str | None) -> str:
        return "none" if path is None else repr(Path(path).read_bytes()[:60])

    def fail() -> None:
        raise RuntimeError(SECRET)

    def refuse() -> None:
        raise gr.Error("the file is no video")

    with gr.Blocks(analytics_enabled=False) as page:
        given, said, button = gr.File(), gr.Textbox(), gr.Button("go")
        button.click(read, given, said, api_name="read")
        button.click(fail, api_name="fail")
        button.click(refuse, api_name="refuse")
    return page


def bare_app() -> FastAPI:
    """Without FastAPI's own pages."""
    return FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Host and port of an application."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready = threading.Event()
        server = server_of(app, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def serving_small_page(uploads: Path, token: str | None = None) -> Iterator[Served]:
    """The small page."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", str(uploads))
        page = small_page()
        app = mount(bare_app(), page, uploads=uploads, token=token, max_upload_bytes=MAX_UPLOAD_BYTES)
        functions = {function.api_name: number for number, function in page.fns.items()}
        with serving(app) as host:
            yield Served(host, uploads, functions)


def upload(client: httpx.Client, content: bytes, name: str = "clip.mp4") -> str:
    """Upload as the page does; the path of the upload."""
    answer = client.post("/gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200, answer.text
    [path] = answer.json()
    return str(path)


def file_data(path: object, **more: object) -> dict[str, object]:
    """What gradio's page sends for a file."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def ask(client: httpx.Client, function: int, data: list[Any], session: str = "s1") -> dict[str, Any]:
    """Call a function of a page through its queue, as the page does: the last message."""
    body = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": None, "event_data": None}
    joined = client.post("/gradio_api/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return dict(message)
    raise AssertionError("the stream ended without an answer")
