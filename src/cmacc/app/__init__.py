"""A local web page of an index or a run: search, and look."""

from cmacc.app.opened import AppError, Opened, open_target
from cmacc.app.server import serve

__all__ = ["AppError", "Opened", "open_target", "serve"]
