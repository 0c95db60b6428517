"""The synthetic world: generated videos in which visible events cause the audio."""

from cmacc.clips.synthetic.event import Event, WorldConfig
from cmacc.clips.synthetic.localised import LocalisedFilm, describe_film, render_film, write_localised_world
from cmacc.clips.synthetic.world import describe_clip, mux, render_clip, write_clip, write_world

__all__ = [
    "Event",
    "LocalisedFilm",
    "WorldConfig",
    "describe_clip",
    "describe_film",
    "mux",
    "render_clip",
    "render_film",
    "write_clip",
    "write_localised_world",
    "write_world",
]
