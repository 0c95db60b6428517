"""The tabs of a run's curves and negatives, and of the files."""

import logging

import gradio as gr

from cmacc.app.pages import MadePage, StoppedError, frame
from cmacc.app.rendering import message, render, without_paths

_log = logging.getLogger(__name__)


def report_tab() -> None:
    """Add the report of the run to the page."""
    gr.HTML(
        render("report_head.html.j2") + frame("/run/report", "Report of the run", "Making the report: some seconds …"),
    )


def negatives_tab(page: MadePage) -> None:
    """Add the page of the run's negatives to the page."""
    gr.HTML(
        "<p>Training shows the encoder wrong partners beside the right one, the <em>negatives</em>. This page shows "
        "which ones the run chose, or would choose, beside random ones. Making it takes a minute or more.</p>",
    )
    _made_page(page, "/run/negatives", "Negatives of the run", "Make this page")


def doctor_tab(page: MadePage) -> None:
    """Add the page about the files to the page."""
    gr.HTML(
        "<p>Are the files in order? Every file is decoded once, to find those that are broken, silent, black, still or "
        "there twice. No file is changed.</p>",
    )
    _made_page(page, "/run/doctor", "State of the files", "Examine the files")


def _made_page(page: MadePage, address: str, title: str, make_it: str) -> None:
    def shown() -> str:
        if page.is_being_made:
            return message("This page is being made. Open this tab again in a while, or press Stop.")
        if page.text is None and page.left() is None:
            return message("This page has not been made yet.")
        return frame(f"{address}?made={page.times_made}", title, "Opening the page …")

    def make(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008, gradio finds it by its default
        def told(what: str, done: int, total: int) -> None:
            progress((done, total) if total else None, desc="working", unit=what)

        try:
            page.make(told)
        except StoppedError:
            return message("Stopped.")
        except (ValueError, OSError) as error:
            return message(without_paths(error))
        except Exception:
            _log.exception("%s failed", title)
            return message("This page cannot be made; the log of the server says why.")
        return shown()

    with gr.Row():
        button = gr.Button(make_it, variant="primary", scale=0, min_width=200)
        # Another visitor may have begun it.
        stop = gr.Button("Stop", scale=0, min_width=100)
    place = gr.HTML(shown)  # called whenever someone opens the page
    button.click(make, outputs=place, concurrency_id="pages", concurrency_limit=1)
    stop.click(page.stop)
