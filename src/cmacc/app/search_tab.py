"""The tab of the search."""

from cmacc.app.opened import Opened
from cmacc.search import Index


def search_tab(opened: Opened, index: Index) -> None:
    """Add the inputs of a search, and its results, to the page."""
    raise NotImplementedError
