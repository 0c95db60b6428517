"""What the page plays and shows of a file: the file itself, parts of it, frames, spectrograms and heat-maps."""

from fastapi import APIRouter

from cmacc.app.opened import Opened


def media_routes(opened: Opened) -> APIRouter:
    """Routes ``/media/ID...``, for the ids of the library only."""
    raise NotImplementedError
