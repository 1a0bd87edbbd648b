"""Merge the results of shards into one run, in which a missing shard's checkpoints are not run."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

import msgspec

from quantgate import __version__
from quantgate.errors import BadInput
from quantgate.judging.checks import place_of
from quantgate.judging.results import CheckResult, probes_of
from quantgate.judging.verdict import Verdict, not_run
from quantgate.reporting.run import Run
from quantgate.reporting.shard import Shard
from quantgate.subject.checkpoint_file import read_all_checkpoint_files
from quantgate.subject.task import GENERATE

RESULTS = "results.json"
# The check of a checkpoint that no run has judged: which checks it would have had is not known.
EVERY_CHECK = "every-check"


def results_json(run: Run) -> str:
    """Return all that a report is made of: gate.json lacks the evidence and the profiles.

    NaN and infinity are written as Python's JSON has them; only `read_results` reads this.
    """
    values = dataclasses.asdict(run)
    del values["place_of"]
    return json.dumps({"quantgate": __version__, "run": values}, ensure_ascii=False) + "\n"


def read_results(path: Path) -> Run:
    """Invert `results_json`; `BadInput` if another version wrote it, or nothing that is known."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values["quantgate"]) != __version__:
            raise BadInput(
                f"{path}: quantgate {version} has judged this and {__version__} would merge it, "
                "and versions may judge differently; judge it again, or merge with that version."
            )
        hints = get_type_hints(Run)
        fields = {
            name: msgspec.convert(value, hints[name]) for name, value in values["run"].items()
        }
        return Run(**fields, place_of=place_of)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{path}: not the results of a shard ({type(error).__name__}: {error}); judge it again."
        ) from None


def merge(directories: Iterable[Path], project: Path) -> Run:
    """Merge the directories that the shards of one selection have written.

    A shard without results adds a not-run result for each of its checkpoints; their schemes and
    tasks come from their files in `project`, if they have any there.
    """
    paths = [directory / RESULTS for directory in dict.fromkeys(directories)]
    unfinished = [path for path in paths if not path.is_file()]
    found = _by_number([path for path in paths if path not in unfinished])
    if not found:
        raise BadInput(
            f"{paths[0]}: no such file, so there is nothing to merge; give the directories that "
            "`quantgate gate --shard I/N` has written."
        )
    runs = [found[number] for number in sorted(found)]
    missing = _missing(runs)
    notes = [
        *(f"{path.parent}: no {RESULTS}, so this shard did not finish" for path in unfinished),
        *(
            f"shard {shard.name} is missing, so its checkpoints were not run: "
            f"{', '.join(shard.own) or 'none'}"
            for shard in missing
        ),
    ]
    unrun = [_missing_run(shard, project, runs[0].started) for shard in missing]
    return joined([*runs, *unrun], notes)


def joined(runs: Sequence[Run], notes: Iterable[str] = ()) -> Run:
    """Return one run of all the shards of a selection; `notes` are said first."""
    results = [result for run in runs for result in run.results]
    started, duration_s = _span(runs)
    return Run(
        sorted(results, key=lambda result: (result.checkpoint, place_of(result.check))),
        started=started,
        duration_s=duration_s,
        environment=_joined([run.environment for run in runs]),
        left_out=[left for run in runs for left in run.left_out],
        notes=list(dict.fromkeys([*notes, *(note for run in runs for note in run.notes)])),
        engines=[life for run in runs for life in run.engines],
        histories={name: history for run in runs for name, history in run.histories.items()},
        place_of=place_of,
        tiers={name: tier for run in runs for name, tier in run.tiers.items()},
    )


def _by_number(paths: Sequence[Path]) -> dict[int, Run]:
    """Read shards; `BadInput` unless they are different shards of one selection."""
    found: dict[int, tuple[Path, Run]] = {}
    for path in paths:
        run = read_results(path)
        if run.shard is None:
            raise BadInput(f"{path}: a whole run, not a shard; there is nothing to merge it with.")
        for other_path, other in found.values():
            _require_one_selection(path, run.shard, other_path, other.shard)
            require_one_probe(str(path), run, str(other_path), other)
        before = found.setdefault(run.shard.number, (path, run))
        if before[0] is not path and results_json(before[1]) != results_json(run):
            raise BadInput(
                f"{path}: shard {run.shard.name} again, with other results than {before[0]}; leave "
                "one of them out."
            )
    return {number: run for number, (_, run) in found.items()}


def _require_one_selection(path: Path, one: Shard, other_path: Path, other: Shard | None) -> None:
    assert other is not None
    differences = (
        (one.of != other.of, f"is shard {one.name}", f"is shard {other.name}"),
        (
            one.checkpoints != other.checkpoints,
            f"has the selection {', '.join(one.checkpoints)}",
            f"has {', '.join(other.checkpoints)}",
        ),
        (one.asked != other.asked, f"was run {_said(one.asked)}", f"was run {_said(other.asked)}"),
    )
    for differs, ours, theirs in differences:
        if differs:
            raise BadInput(
                f"{path} {ours}, but {other_path} {theirs}; only shards of one selection, run with "
                "the same options, can be merged."
            )


def require_one_probe(where: str, one: Run, other_where: str, other: Run) -> None:
    """Raise `BadInput` if two runs have scored different probes of one name.

    Different tokenizers and tiers score different tokens of one probe, so its file is compared.
    """
    files = {probe.stored_name: probe.file_sha256 for probe in probes_of(other.results)}
    for probe in probes_of(one.results):
        theirs = files.get(probe.stored_name, probe.file_sha256)
        if theirs != probe.file_sha256:
            raise BadInput(
                f"{where} has scored a probe '{probe.stored_name}' whose file has the sha256 "
                f"{probe.file_sha256[:12]}…, and {other_where} one of {theirs[:12]}…; judge one of "
                "them again with the other's probe."
            )


def _said(asked: Mapping[str, str]) -> str:
    options = " ".join(f"{name} {value}" for name, value in asked.items())
    return f"with {options}" if options else "without options"


def _missing(runs: Sequence[Run]) -> list[Shard]:
    first = runs[0].shard
    assert first is not None
    there = {run.shard.number for run in runs if run.shard is not None}
    every = range(1, first.of + 1)
    return [dataclasses.replace(first, number=n) for n in every if n not in there]


def _missing_run(shard: Shard, project: Path, started: str) -> Run:
    verdict = not_run(
        f"there are no results of shard {shard.name}, which was to judge it",
        f"run `quantgate gate` with --shard {shard.name} again, then `quantgate merge`",
    )
    return unjudged(shard, verdict, project, started)


def unjudged(shard: Shard, verdict: Verdict, project: Path, started: str) -> Run:
    """Return what stands for the run of a shard that has no results: each checkpoint is not run.

    `verdict` says why. Schemes and tasks come from the checkpoints' files in `project`, if they
    have any there.
    """
    known = read_all_checkpoint_files(project)
    results = []
    for name in shard.own:
        file = known.get(name)
        results.append(
            CheckResult(
                name,
                (file.scheme if file else None) or "unknown",
                EVERY_CHECK,
                verdict,
                task=file.task if file else GENERATE,
                base=file.base if file else None,
            )
        )
    return Run(results, started, 0.0, {}, shard=shard)


def _span(runs: Sequence[Run]) -> tuple[str, float]:
    """Return when the first run started, and the seconds from then to the end of the last."""
    starts = [datetime.datetime.fromisoformat(run.started) for run in runs]
    ends = [
        start + datetime.timedelta(seconds=run.duration_s)
        for start, run in zip(starts, runs, strict=True)
    ]
    first = min(starts)
    return first.isoformat(timespec="seconds"), (max(ends) - first).total_seconds()


def _joined(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what the machines have, each value once: "0.31.0 and 0.32.0" where they differ."""
    names = dict.fromkeys(name for environment in environments for name in environment)
    return {
        name: " and ".join(dict.fromkeys(e[name] for e in environments if name in e))
        for name in names
    }
