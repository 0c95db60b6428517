"""The command line; the commands stand in files by stage."""

from cmacc.cli.commands import main

__all__ = ["main"]
