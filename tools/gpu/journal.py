"""What was measured so far, on the disk: so that an item which ends its process is known."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.atomic import write_atomically


@dataclass(frozen=True)
class Journal:
    """What was measured of one part: a file for each item."""

    directory: Path
    worker: int = 0
    """Which of the part's workers measures: what each has in hand is kept apart."""

    def path(self, item: str) -> Path:
        """Return where an item's figures lie."""
        return self.directory / f"{hashlib.sha256(item.encode()).hexdigest()[:16]}.json"

    def read(self, item: str) -> dict[str, Any] | None:
        """Return what was written of an item; None of one that has not ended."""
        try:
            found: dict[str, Any] = json.loads(self.path(item).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def write(self, item: str, **said: Any) -> None:
        """Write what became of an item, and no longer that it is being measured."""
        text = json.dumps({"item": item, **said}, indent=2, ensure_ascii=False)
        write_atomically(self.path(item), text + "\n")
        self.running.unlink(missing_ok=True)

    @property
    def running(self) -> Path:
        """The file that names the item that its worker is measuring."""
        return self.directory / f"running-{self.worker}"

    def start(self, item: str) -> None:
        """Write that its worker is measuring an item."""
        write_atomically(self.running, item)

    def started(self) -> tuple[str, float] | None:
        """Return the item that its worker is measuring, and since when; None without one."""
        try:
            return self.running.read_text(encoding="utf-8"), self.running.stat().st_mtime
        except FileNotFoundError:
            return None

    def everything(self) -> list[dict[str, Any]]:
        """Return what was written of every item, of earlier runs too."""
        found = [json.loads(path.read_text("utf-8")) for path in self.directory.glob("*.json")]
        return sorted(found, key=lambda said: str(said["item"]))

    def waiting(self, items: Sequence[str]) -> list[str]:
        """Return the items that have not ended."""
        return [item for item in items if self.read(item) is None]
