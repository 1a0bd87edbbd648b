"""Directories for data too large for memory, removed however their process ends."""

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
    """Return a new directory, removed with `owner`; also remove those of killed processes."""
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
    """Remove this user's directories whose process, which held the lock inside, has ended.

    Leaves directories of the same name without such a lock: they were not created here.
    """
    from filelock import FileLock, Timeout

    for lock in where.glob(f"{PREFIX}*/{LOCK}"):
        try:
            # A newer one may belong to a process that has yet to lock it.
            found = lock.parent.lstat()
            if found.st_uid != os.getuid() or found.st_mtime > time.time() - HOUR:
                continue
            with FileLock(lock).acquire(timeout=0):
                shutil.rmtree(lock.parent, ignore_errors=True)
        except (Timeout, OSError):
            continue
