"""The server: routes of our own, and the page of gradio behind a guard."""

import os
from pathlib import Path

# Before gradio is imported: it would report its start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI

from cmacc.app.map_page import map_routes
from cmacc.app.media import media_routes
from cmacc.app.opened import Opened
from cmacc.app.page import make_page
from cmacc.app.run_pages import RunPages, run_routes


def make_app(opened: Opened, *, uploads: Path, token: str | None = None) -> FastAPI:
    """The whole application, to run in any ASGI server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    run_pages = RunPages(opened)
    app.include_router(media_routes(opened))
    app.include_router(map_routes(opened))
    app.include_router(run_routes(run_pages))
    page = make_page(opened, run_pages)
    page.queue(default_concurrency_limit=2)
    served: FastAPI = gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return served


def serve(opened: Opened, *, host: str = "127.0.0.1", port: int = 7860, token: str | None = None) -> None:
    """Serve the page until Ctrl-C."""
    raise NotImplementedError
