"""Which xdist worker judges what: all checks of a checkpoint on one, so that they share an engine.

xdist's own `--dist loadgroup` writes the group into a private attribute of pytest's, which pytest
9.2 no longer reads: with xdist 3.8.0 every check then goes wherever there is room.
"""

from __future__ import annotations

import re

from xdist.scheduler.loadscope import LoadScopeScheduling  # type: ignore[import-untyped]

# "…::test_drift[tiny-llama-w4a16-cpu-float32]": the parameters are the checkpoint, the device and
# whatever else.
_CHECKPOINT = re.compile(r"\[(?P<checkpoint>[a-z0-9.-]+)-(?:cpu|cuda)(?:-[^\]]*)?\]")


def group_of(nodeid: str) -> str:
    """Return the checkpoint of a check; the file of a test that judges none."""
    found = _CHECKPOINT.search(nodeid)
    return found["checkpoint"] if found else nodeid.partition("::")[0]


class CheckpointScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """xdist's scheduling by scope, where that is a checkpoint, or the file of other tests."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
