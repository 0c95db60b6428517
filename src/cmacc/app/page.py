"""The page: a title, and one tab for each thing to do. Each tab stands in a file of its own."""

import gradio as gr

from cmacc.app.opened import Opened
from cmacc.app.search_tab import search_tab


def make_page(opened: Opened) -> gr.Blocks:
    """The page of an index or a run."""
    with gr.Blocks(title=f"{opened.name} · cmacc", analytics_enabled=False) as page:
        if opened.index is not None:
            with gr.Tab("Search"):
                search_tab(opened, opened.index)
    blocks: gr.Blocks = page
    return blocks
