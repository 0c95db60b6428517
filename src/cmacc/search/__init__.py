"""Search: find the moments of videos, and the places in the picture, that belong to a sound."""

from cmacc.search.heat_pictures import write_strip, write_video
from cmacc.search.localise import Localisation, LocalisedMoment, localise

__all__ = ["Localisation", "LocalisedMoment", "localise", "write_strip", "write_video"]
