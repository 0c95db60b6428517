"""The page: a title, and one tab for each thing to do. Each tab stands in a file of its own."""

import gradio as gr

from cmacc.app.map_tab import map_tab
from cmacc.app.opened import Opened
from cmacc.app.queries import warm_up
from cmacc.app.rendering import render
from cmacc.app.run_pages import RunPages
from cmacc.app.run_tabs import doctor_tab, negatives_tab, report_tab
from cmacc.app.search_tab import search_tab


def make_page(opened: Opened, run_pages: RunPages) -> gr.Blocks:
    """The page of an index or a run."""
    with gr.Blocks(title=f"{opened.name} · cmacc", analytics_enabled=False) as page:
        gr.HTML(render("title.html.j2", name=opened.name, is_index=opened.index is not None))
        if opened.index is not None:
            warm_up(opened.index)
            with gr.Tab("Search"):
                search_tab(opened, opened.index)
        with gr.Tab("Map"):
            map_tab()
        if run_pages.report is not None:
            with gr.Tab("Training"):
                report_tab()
        if run_pages.negatives is not None:
            with gr.Tab("Negatives"):
                negatives_tab(run_pages.negatives)
        with gr.Tab("Files"):
            doctor_tab(run_pages.doctor)
    # Only then does gradio refuse paths outside of its folder of uploads. A page that is mounted never is launched.
    page.has_launched = True
    blocks: gr.Blocks = page
    return blocks
