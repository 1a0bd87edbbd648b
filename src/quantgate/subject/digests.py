"""The sha256 of files, many at a time; those of large ones are kept until the file changes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantgate.atomic import write_atomically

# Hashing a smaller file takes no longer than reading what was kept of it.
KEPT_FROM = 16 << 20
# Enough requests in flight to read at the speed of a striped disk.
READERS = 8


def sha256_of(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the sha256 of each file, in 64 hex digits."""
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(paths, readers.map(_sha256, paths), strict=True))


def _sha256(path: Path) -> str:
    return _once(path.absolute(), _version(path))


@functools.lru_cache(maxsize=4096)
def _once(path: Path, version: tuple[int, ...]) -> str:
    """Return a file's digest: from memory, or as it was kept, or computed."""
    size = version[0]
    if size < KEPT_FROM:
        return _computed(path)
    kept = _cache_directory() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    if (digest := _read(kept, version)) is None:
        digest = _computed(path)
        # A file that was written meanwhile has another version, and is not kept.
        if _version(path) == version:
            _keep(kept, version, digest)
    return digest


def _version(path: Path) -> tuple[int, ...]:
    """Return what changes whenever a file is written or replaced.

    The time of its last change (ctime) cannot be set by a program, unlike that of its last write.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _computed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (never raises)
    return Path(root) / "quantgate" / "sha256"


def _read(kept: Path, version: tuple[int, ...]) -> str | None:
    try:
        content = json.loads(kept.read_text())
        digest = content["sha256"] if content["version"] == list(version) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _keep(kept: Path, version: tuple[int, ...], digest: str) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps({"version": version, "sha256": digest}))
    except OSError:
        pass  # it is computed again next time
