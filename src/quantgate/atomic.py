"""Writing files that are whole or not there."""

import glob
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# A file being written that is older is what a killed process left.
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
    """Remove what killed processes left of writing this file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError):  # another process may be removing it, too
            if left.stat().st_mtime < time.time() - HOUR:
                left.unlink()
