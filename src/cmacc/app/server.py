"""The server: routes of our own, and the page of gradio behind a guard."""

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any

# Before gradio is imported: it would report its start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmacc.app.guard import Guard
from cmacc.app.map_page import map_routes
from cmacc.app.media import media_routes
from cmacc.app.opened import AppError, Opened
from cmacc.app.page import make_page
from cmacc.app.run_pages import RunPages, run_routes
from cmacc.app.uploads import Uploads

_log = logging.getLogger("cmacc.app")

MAX_UPLOAD_BYTES = 500_000_000
TERMINATED = 143  # 128 + SIGTERM, as a shell says it
_MOST_WAITING = 100
_MOST_CONNECTIONS = 500
_SECONDS_TO_ASK = 20.0


def make_app(
    opened: Opened,
    *,
    uploads: Path,
    token: str | None = None,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
) -> FastAPI:
    """The whole application, to run in any ASGI server.

    Parameters
    ----------
    opened
        What to show.
    uploads
        Folder for what visitors upload.
    token
        If set, every request needs it.
    max_upload_bytes
        Greatest size of an upload.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    run_pages = RunPages(opened)
    app.include_router(media_routes(opened))
    app.include_router(map_routes(opened))
    app.include_router(run_routes(run_pages))
    # Read when a component is made.
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.resolve())
    return mount(app, make_page(opened, run_pages), uploads=uploads, token=token, max_upload_bytes=max_upload_bytes)


def mount(app: FastAPI, page: Any, *, uploads: Path, token: str | None, max_upload_bytes: int) -> FastAPI:
    """Add a page of gradio to an application, and the guard in front of both."""
    own_routes = list(app.routes)
    # Else any function could be called beside the queue, by as many as like.
    page.queue(default_concurrency_limit=2, max_size=_MOST_WAITING, api_open=False)
    page.process_api = _saying_little(page.process_api)
    served: FastAPI = gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
        max_file_size=max_upload_bytes,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    served.add_middleware(Guard, own_routes=own_routes, uploads=Uploads(uploads, max_upload_bytes), token=token)
    return served


def _saying_little(process: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Errors that a page's function did not foresee are for the log; gradio would show nothing, or their whole text."""

    async def processed(*arguments: Any, **named: Any) -> Any:
        try:
            return await process(*arguments, **named)
        except gr.Error as error:
            error.print_exception = False  # it is a message for the visitor
            raise
        except Exception:
            _log.exception("an error in a function of the page")
            raise gr.Error(
                "This did not work. The server's log says why.", print_exception=False, title="Error"
            ) from None

    return processed


def serve(
    opened: Opened,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    open_browser: bool = False,
) -> None:
    """Serve the page until Ctrl-C, which raises KeyboardInterrupt, or SIGTERM, which leaves with exit code 143.

    Parameters
    ----------
    opened
        What to show.
    host, port
        Address to listen at; port 0 takes a free one.
    token, max_upload_bytes
        As for `make_app`.
    open_browser
        Open the page in a browser of this machine.

    Raises
    ------
    AppError
        The address is in use, or not of this machine.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    with _bound(host, port) as listener, tempfile.TemporaryDirectory(prefix="cmacc-app-") as uploads:
        signal.signal(signal.SIGTERM, _leave)
        # A browser cannot open "all addresses".
        reached = socket.gethostname() if host in ("0.0.0.0", "::") else _in_address(host)
        address = f"http://{reached}:{listener.getsockname()[1]}"
        shown = address if token is None else f"{address}/?token={token}"

        def announce() -> None:
            print(f"open {shown}", flush=True)
            if open_browser:
                webbrowser.open(shown)

        app = make_app(opened, uploads=Path(uploads), token=token, max_upload_bytes=max_upload_bytes)
        try:
            server_of(app, announce).run(sockets=[listener])
            # It ends by a signal alone. On a busy machine it once ended by Ctrl-C without raising it again.
            raise KeyboardInterrupt
        except SystemExit:
            # A search that runs would be waited for; nothing of it is kept.
            shutil.rmtree(uploads, ignore_errors=True)
            os._exit(TERMINATED)


def server_of(app: FastAPI, announce: Callable[[], None]) -> uvicorn.Server:
    """uvicorn with our limits; it calls ``announce`` once it answers."""
    config = uvicorn.Config(
        app,
        http=_Patience,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return _Server(config, announce)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise AppError(
            f"--host {host} --port {port}: must be an address of this machine that is not in use, got {error}; "
            "--port 0 takes a free port"
        ) from error


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Pages that are open hold streams, which are cut: uvicorn would log the stack of each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


class _Patience(H11Protocol):
    """Closes connections whose next request does not come in whole; uvicorn's own limit ends with its first byte."""

    _asking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._asking is None:
            self._asking = self.loop.call_later(_SECONDS_TO_ASK, self.transport.close)

    def _forget(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
