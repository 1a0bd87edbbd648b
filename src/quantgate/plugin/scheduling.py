"""Which xdist worker judges what: all checks of a checkpoint on one, so that they share an engine.

xdist's own `--dist loadgroup` writes the group into a private attribute of pytest's, which pytest
9.2 no longer reads: with xdist 3.8.0 every check then goes wherever there is room.
"""

from __future__ import annotations

import re
from typing import Any, cast

from xdist.scheduler.loadscope import LoadScopeScheduling  # type: ignore[import-untyped]

# "…::test_drift[tiny-llama-w4a16-cpu-float32]": the parameters are the checkpoint, the device and
# whatever else.
_CHECK = re.compile(
    r"[^\[]*::test_(?P<name>\w+)"
    r"\[(?P<checkpoint>[a-z0-9.-]+)-(?:cpu|cuda)(?:-(?P<more>[^\[\]]*))?\]"
)


def group_of(nodeid: str) -> str:
    """Return the checkpoint of a check; the file of a test that judges none."""
    found = _CHECK.fullmatch(nodeid)
    return found["checkpoint"] if found else nodeid.partition("::")[0]


def check_of(nodeid: str) -> str | None:
    """Return the name of a check, e.g. "drift-float32"; None of a test that judges nothing."""
    if (found := _CHECK.fullmatch(nodeid)) is None:
        return None
    return "-".join(filter(None, (found["name"].replace("_", "-"), found["more"])))


class CheckpointScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """xdist's scheduling by scope, where that is a checkpoint, or the file of other tests."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def remove_node(self, node: Any) -> str | None:
        """Return what a worker did not survive, if anything, and give up the rest of its scope.

        It needs the engine that ended the worker, and would end its heir as well; what else was
        waiting for the worker goes to others.
        """
        waiting: dict[str, dict[str, bool]] = self.assigned_work[node]
        scope = next((name for name, done in waiting.items() if not all(done.values())), None)
        if scope is None:
            return cast(str | None, super().remove_node(node))
        given_up = waiting.pop(scope)
        super().remove_node(node)
        return next(nodeid for nodeid, done in given_up.items() if not done)
