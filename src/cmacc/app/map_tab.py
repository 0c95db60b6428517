"""The tab of the map."""

import gradio as gr

from cmacc.app.pages import frame


def map_tab() -> None:
    """Add the map to the page."""
    gr.HTML(frame("/map", "Map of the embeddings", "Drawing the map …", scripts=True))
