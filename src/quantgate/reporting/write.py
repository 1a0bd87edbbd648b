"""Write all reports of a run, each atomically."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.atomic import write_atomically
from quantgate.reporting.gate_json import gate_json
from quantgate.reporting.html import index_html
from quantgate.reporting.junit import junit_xml
from quantgate.reporting.markdown import gate_md
from quantgate.reporting.merge import RESULTS, results_json

if TYPE_CHECKING:
    from quantgate.reporting.run import Run

FILES = ("gate.json", "junit.xml", "gate.md", "index.html")


def write_reports(run: Run, directory: Path) -> None:
    """Write gate.json, junit.xml, gate.md and index.html into a directory.

    A shard's has results.json too, the last of all: it is what `quantgate merge` reads.
    """
    contents = (gate_json(run), junit_xml(list(run.results)), gate_md(run), index_html(run))
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(directory / name, content)
    if run.shard is not None:
        write_atomically(directory / RESULTS, results_json(run))
