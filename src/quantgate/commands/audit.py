"""`python -m quantgate audit`: what is wrong with a checkpoint's files, and how it is shown."""

from __future__ import annotations

import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from quantgate import __version__
from quantgate.audit.beside_base import comparisons
from quantgate.audit.finding import SEVERITIES, Finding, Rule, Severity
from quantgate.audit.inventory import LAYER, Inventory, read_inventory
from quantgate.audit.rules import RULES, examine
from quantgate.audit.shown import shown
from quantgate.errors import BadInput

# Findings of one rule that a table shows.
SHOWN = 8
BARS = "▁▂▃▄▅▆▇█"
# dB above rounding's error that fill a bar.
HIGHEST = 12.0
SARIF_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "note"}
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True)
class Audited:
    """A checkpoint, and what was found."""

    inventory: Inventory
    findings: tuple[Finding, ...]
    deep: bool


def run(directory: Path, base: Path | None, *, deep: bool, quiet: bool) -> Audited:
    """Audit a checkpoint; weights are compared under a progress bar, on stderr."""
    inventory = read_inventory(directory, base)
    if not deep:
        return Audited(inventory, examine(inventory), deep)
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("Comparing weights with the base's", total=None)

        def show(_name: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        watched = replace(inventory, progress=show)
        return Audited(watched, examine(watched, deep=True), deep)


def table(audited: Audited) -> str:
    """Return findings by rule, errors first, for a terminal; and a picture of weights' errors."""
    by_rule: dict[str, list[Finding]] = defaultdict(list)
    for finding in audited.findings:
        by_rule[finding.rule].append(finding)
    lines: list[str] = []
    for rule in sorted(RULES, key=lambda rule: SEVERITIES.index(rule.severity)):
        found = by_rule.get(rule.id, [])
        if not found:
            continue
        lines.append(f"{rule.severity.upper()} {rule.id}: {rule.why}")
        lines += [f"  {finding}" for finding in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"  and {len(found) - SHOWN} more; --json has them all")
    if audited.deep:
        lines.append(picture(audited.inventory))
    lines.append(summary(audited.findings))
    return "\n".join(lines) + "\n"


def summary(findings: Iterable[Finding]) -> str:
    """Return how many findings of each severity there are, in a line."""
    severities = [finding.severity for finding in findings]
    counts = {severity: severities.count(severity) for severity in SEVERITIES}
    return ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items())


def picture(inventory: Inventory) -> str:
    """Return, for each kind of linear, a bar a layer: dB of error above rounding's."""
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    for name, compared in comparisons(inventory).items():
        if (match := LAYER.search(name)) and compared.group is not None:
            kind = re.sub(r"\.\d+\.", ".", name[match.end() :])
            layer = int(match.group(1))
            excess = compared.likeness.excess
            kinds[kind][layer] = max(excess, kinds[kind].get(layer, excess))
    width = max(map(len, kinds), default=0)
    lines = [
        f"dB of error above rounding to nearest, by layer ({BARS[-1]} is {HIGHEST:g} or more):"
    ]
    for kind, layers in kinds.items():
        bars = "".join(_bar(layers[layer]) for layer in sorted(layers))
        lines.append(f"  {kind:{width}} {bars}  largest {max(layers.values()):.1f}")
    return "\n".join(lines)


def _bar(excess: float) -> str:
    return BARS[int(min(max(excess, 0.0) / HIGHEST, 1.0) * (len(BARS) - 1))]


def to_json(audited: Audited) -> str:
    """Return findings as JSON, each with its rule's reasons."""
    reasons = {rule.id: {"why": rule.why, "seen": rule.seen} for rule in RULES}
    found = [asdict(finding) | reasons[finding.rule] for finding in audited.findings]
    directory = shown(str(audited.inventory.directory))
    document = {"checkpoint": directory, "quantgate": __version__, "findings": found}
    return json.dumps(document, indent=2) + "\n"


def to_sarif(findings: Iterable[Finding]) -> str:
    """Return findings as SARIF 2.1.0, for code-scanning pages."""
    rules = [
        {
            "id": rule.id,
            "shortDescription": {"text": rule.why},
            "help": {"text": f"Seen in the wild: {rule.seen}."},
            "defaultConfiguration": {"level": SARIF_LEVELS[rule.severity]},
        }
        for rule in RULES
    ]
    driver = {"name": "quantgate audit", "version": __version__, "rules": rules}
    results = [_result(finding) for finding in findings]
    run = {"tool": {"driver": driver}, "results": results}
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _result(finding: Finding) -> dict[str, Any]:
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": finding.name}]}
    uri = finding.file or "config.json"
    location["physicalLocation"] = {"artifactLocation": {"uri": uri}}
    return {
        "ruleId": finding.rule,
        "level": SARIF_LEVELS[finding.severity],
        "message": {"text": str(finding)},
        "locations": [location],
    }


def list_rules() -> str:
    """Return every rule in a line."""
    width = max(len(rule.id) for rule in RULES)
    return "".join(f"{rule.id:{width}} {rule.severity:7} {rule.why}\n" for rule in RULES)


def explain(name: str) -> str:
    """Return what there is to know of a rule; `BadInput` where there is none of that name."""
    rule = next((rule for rule in RULES if rule.id == name), None)
    if rule is None:
        raise BadInput(f"no rule {name!r}; --rules lists them.")
    return _explained(rule)


def _explained(rule: Rule) -> str:
    needs = {"files": "PATH", "base": "--base", "weights": "--base and --deep"}[rule.needs]
    lines = [f"{rule.id} ({rule.severity}, needs {needs})"]
    lines += textwrap.wrap(rule.why, 88, initial_indent="  ", subsequent_indent="  ")
    lines += textwrap.wrap(f"Seen: {rule.seen}.", 88, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines) + "\n"
