"""The synthetic world: generated videos in which visible events cause the audio."""

from cmacc.clips.synthetic.event import Event, WorldConfig
from cmacc.clips.synthetic.world import describe_clip, mux, render_clip, write_clip, write_world

__all__ = ["Event", "WorldConfig", "describe_clip", "mux", "render_clip", "write_clip", "write_world"]
