"""The synthetic world: video files in which what is seen causes what is heard."""

from cmacc.clips.synthetic.event import Event, WorldConfig
from cmacc.clips.synthetic.world import describe_clip, mux, render_clip, write_clip, write_world

__all__ = ["Event", "WorldConfig", "describe_clip", "mux", "render_clip", "write_clip", "write_world"]
