"""Decode exact windows of files: containers, frames, audio, guarded processes."""
