"""Atomic file writes: a file is complete or absent."""

import glob
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# A temporary file older than this was left by a killed process.
HOUR = 3600


def write_atomically(path: Path, content: str | bytes) -> None:
    """Atomically replace `path`; an interrupted write leaves the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with tempfile.NamedTemporaryFile(
        "wb", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.chmod(0o644)
    temporary.replace(path)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this path that killed processes left behind."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError):  # another process may be removing it too
            if left.stat().st_mtime < time.time() - HOUR:
                left.unlink()
