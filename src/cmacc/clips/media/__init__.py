"""Containers, frames, sound, guarded processes: from a file to exact windows of it."""
