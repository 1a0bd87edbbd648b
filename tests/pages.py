"""Look at a page of the report: its elements, and what a browser makes of it."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = shutil.which("chromium")


class Elements(HTMLParser):
    """Counts elements and keeps what could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "href", "action", "srcset"):
                self.loads.append(f"{name}={value}")


def elements(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


def browse(page: Path, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Show a page in the browser that there is; prints what became of it."""
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
