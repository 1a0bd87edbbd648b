"""Schedule all checks of a checkpoint on one xdist worker, so that they share an engine.

xdist's own `--dist loadgroup` does not work: it stores the group in a private attribute of pytest,
which pytest 9.2 no longer reads, so xdist 3.8.0 sends each check to any free worker.
"""

from __future__ import annotations

import re
from typing import Any, cast

from xdist.scheduler.loadscope import LoadScopeScheduling  # type: ignore[import-untyped]

# "…::test_drift[tiny-llama-w4a16-cpu-float32]": the parameters are the checkpoint, the device and
# possibly others.
_CHECK = re.compile(
    r"[^\[]*::test_(?P<name>\w+)"
    r"\[(?P<checkpoint>[a-z0-9.-]+)-(?:cpu|cuda)(?:-(?P<more>[^\[\]]*))?\]"
)


def group_of(nodeid: str) -> str:
    """Return a check's checkpoint, or the file of a test without one."""
    found = _CHECK.fullmatch(nodeid)
    return found["checkpoint"] if found else nodeid.partition("::")[0]


def check_of(nodeid: str) -> str | None:
    """Return the name of a check, e.g. "drift-float32"; None for a test that judges nothing."""
    if (found := _CHECK.fullmatch(nodeid)) is None:
        return None
    return "-".join(filter(None, (found["name"].replace("_", "-"), found["more"])))


class CheckpointScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """xdist's scheduling by scope: a check's scope is its checkpoint, another test's its file."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def remove_node(self, node: Any) -> str | None:
        """Return the check that crashed a worker, if any, and give up the rest of its scope.

        The rest of the scope needs the engine that crashed the worker and would crash its
        replacement too. Other work that was waiting for the worker goes to other workers.
        """
        waiting: dict[str, dict[str, bool]] = self.assigned_work[node]
        scope = next((name for name, done in waiting.items() if not all(done.values())), None)
        if scope is None:
            return cast(str | None, super().remove_node(node))
        given_up = waiting.pop(scope)
        super().remove_node(node)
        return next(nodeid for nodeid, done in given_up.items() if not done)
