"""The folder that visitors' files go into: which paths lie in it, and how much it may hold."""

import time
from contextlib import suppress
from pathlib import Path

# As many uploads of the greatest size as may lie there, or be written, at a time.
_KEPT = 6
UPLOADS_AT_ONCE = 4
_MOST_FILES = 500
# A search may still be reading a file that is younger.
_YOUNG_SECONDS = 120.0


class Uploads:
    """A bounded folder.

    Parameters
    ----------
    folder
        Where gradio puts what is uploaded: ``FOLDER/HASH/name.mp4``.
    max_upload_bytes
        Greatest size of one upload; the folder holds six times as much.
    """

    def __init__(self, folder: Path, max_upload_bytes: int) -> None:
        self.folder = folder.resolve()
        self.max_upload_bytes = max_upload_bytes

    def holds(self, path: str) -> bool:
        """Whether this is the absolute path of a file in the folder, with links resolved."""
        if not path.startswith("/") or "\0" in path:
            return False
        try:
            real = Path(path).resolve(strict=True)
        except (OSError, RuntimeError):  # not there; too long; links in a circle
            return False
        return real.is_file() and real.is_relative_to(self.folder)

    def make_room(self) -> bool:
        """Delete the oldest files until all that may be written now fits; False if what is left is in use."""
        files = []
        for file in self.folder.rglob("*"):
            try:
                facts = file.lstat()
            except FileNotFoundError:  # moved to its place meanwhile
                continue
            if not file.is_dir():
                files.append((facts.st_mtime, facts.st_size, file))
        total, count = sum(size for _, size, _ in files), len(files)
        allowed = (_KEPT - UPLOADS_AT_ONCE) * self.max_upload_bytes
        for written, size, file in sorted(files):
            if total <= allowed and count <= _MOST_FILES:
                break
            if time.time() - written < _YOUNG_SECONDS:
                return False
            file.unlink(missing_ok=True)
            with suppress(OSError):  # another file is in it
                file.parent.rmdir()
            total, count = total - size, count - 1
        return True
