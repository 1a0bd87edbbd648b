"""Directories for what is too large for memory: gone with their process, however that ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.atomic import HOUR

if TYPE_CHECKING:
    from filelock import BaseFileLock

PREFIX, LOCK = "quantgate-", "in-use.lock"


def scratch_directory(owner: object) -> Path:
    """Return a new directory that goes with `owner`, and remove what killed processes left."""
    from filelock import FileLock

    remove_leftovers(Path(tempfile.gettempdir()))
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = FileLock(directory / LOCK)
    lock.acquire()
    weakref.finalize(owner, _remove, directory, lock)
    return directory


def _remove(directory: Path, lock: BaseFileLock) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    lock.release()


def remove_leftovers(where: Path) -> None:
    """Remove the directories of this user whose process is no more: it held the lock in each.

    Nothing else that is called so: a directory without such a lock is somebody's own.
    """
    from filelock import FileLock, Timeout

    for lock in where.glob(f"{PREFIX}*/{LOCK}"):
        try:
            # A younger one may be somebody's who is just about to lock it.
            found = lock.parent.lstat()
            if found.st_uid != os.getuid() or found.st_mtime > time.time() - HOUR:
                continue
            with FileLock(lock).acquire(timeout=0):
                shutil.rmtree(lock.parent, ignore_errors=True)
        except (Timeout, OSError):
            continue
