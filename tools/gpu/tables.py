"""Tables of what `make gpu` measured, for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantgate.commands.doctor import names_of_linears
from quantgate.reporting.markdown import escaped, markdown_table

Said = Mapping[str, Any]
Rows = list[list[str]]


def markdown(content: Mapping[str, Any]) -> str:
    """Return every part's table, and what was not run."""
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    command = " ".join(["python tools/measure_gpu.py", *content["command"]])
    lines = [f"{content['date'][:10]}, {content['device']}; {versions}; `{escaped(command)}`.\n"]
    for name, (headings, rows_of) in TABLES.items():
        measured = [said for said in content["parts"].get(name, ()) if "figures" in said]
        if measured:
            rows = [row for said in measured for row in rows_of(said["item"], said["figures"])]
            lines += [f"\n### {name}\n\n", _table(headings, rows)]
    missed = [
        [name, said["item"], said["not_run"]]
        for name, items in content["parts"].items()
        for said in items
        if "not_run" in said
    ]
    if missed:
        lines += ["\n### Not run\n\n", _table(("part", "item", "reason"), missed)]
    return "".join(lines)


def _table(headings: Sequence[str], rows: Rows) -> str:
    return markdown_table(headings, [[escaped(cell.strip()) for cell in row] for row in rows])


def _machine(_: str, figures: Said) -> Rows:
    return [
        [one["scheme"], one["kernels"], "yes" if one["certifies"] else "no"]
        for one in figures["formats"]
    ]


def _formats(item: str, figures: Said) -> Rows:
    name, dtype = item.split(" ")
    replay, fidelity = figures["replay"], figures["fidelity"]
    return [
        [
            figures["scheme"],
            name,
            dtype,
            ", ".join(names_of_linears(figures["kernels"])),
            f"{replay['largest']:.1e} {_unless_pass(replay)}",
            f"{replay['median']:.1e}",
            _measured(fidelity),
            "" if figures["peak_mib"] is None else f"{figures['peak_mib']:,.0f}",
        ]
    ]


def _ways(item: str, figures: Said) -> Rows:
    moved = [m["mean_abs"] for m in figures["noise"].values() if "mean_abs" in m]
    return [
        [
            item,
            figures["dtype"],
            *(_measured(figures[name]) for name in ("invariance", "compiled")),
            f"{max(moved):.1e}" if moved else "",
        ]
    ]


def _batches(item: str, figures: Said) -> Rows:
    return [[item, figures["dtype"], _measured(figures["invariance"])]]


def _scores(item: str, figures: Said) -> Rows:
    return [[*item.split(" "), _measured(figures["fidelity"])]]


def _references(item: str, figures: Said) -> Rows:
    seconds = figures["seconds"]
    return [
        [
            *item.split(" "),
            f"{seconds['cpu']:.2f}",
            f"{seconds['gpu']:.2f}",
            f"{figures['largest']:.1e}",
            f"{figures['mean']:.1e}",
        ]
    ]


def _gate(item: str, figures: Said) -> Rows:
    return [[verdict, str(count)] for verdict, count in figures.items()]


def _sized(item: str, figures: Said) -> Rows:
    shape, scheme, tier = item.split(" ")
    verdicts = [f"{name}: {verdict}" for name, verdict in figures["checks"].items()]
    return [[shape, scheme, tier, f"{figures['seconds']:.0f}", ", ".join(verdicts)]]


def _forced(item: str, figures: Said) -> Rows:
    return [
        [item, figures["disabled"], check["name"], check["verdict"],
         ", ".join(names_of_linears(check["kernels"])), check["since_golden"] or "no golden"]
        for check in figures["checks"]
    ]  # fmt: skip


def _speed(item: str, figures: Said) -> Rows:
    shape, scheme = item.split(" ")
    return [row for work in figures["work"] for row in _speed_of(shape, scheme, work)]


def _speed_of(shape: str, scheme: str, work: Said) -> Rows:
    prefill, score = (work["modes"][name] for name in ("prefill", "score"))
    amount = f"{work['prompts']:,} × {work['tokens']:,}"
    of_floor = f"{work['costs']['of_floor']:.3f}"
    return [
        [
            shape, scheme, amount, name, f"{mode['tokens_per_s']:,.0f}",
            f"{score['tokens_per_s'] / mode['tokens_per_s']:.2f}",
            of_floor if name == "score" else "",
            f"{mode['peak_mib'] - prefill['peak_mib']:,.0f}",
        ]
        for name, mode in work["modes"].items()
    ]  # fmt: skip


def _head(item: str, figures: Said) -> Rows:
    shape, rows = item.split(" ")
    (measured,) = figures["measured"]
    return [
        [
            shape, rows, name, f"{one['milliseconds']:.3f}", f"{one['of_floor']:.2f}",
            *("" if one[what] is None else f"{one[what]:.1e}" for what in ("error", "batch")),
        ]
        if one["failed"] is None
        else [shape, rows, name, f"not run: {one['failed']}", "", "", ""]
        for name, one in measured["candidates"].items()
    ]  # fmt: skip


def _measured(check: Said) -> str:
    if check["measured"] is None:
        return f"{check['verdict']}: {check['detail']}"
    value, allowed = check["measured"], check["allowed"]
    shown = value if isinstance(value, str) else f"{value:.1e}"
    return f"{shown} of {allowed:.1e} {_unless_pass(check)}".strip()


def _unless_pass(check: Said) -> str:
    return "" if check["verdict"] == "pass" else f"({check['verdict']})"


TABLES: dict[str, tuple[Sequence[str], Callable[[str, Said], Rows]]] = {
    "machine": (("format", "kernel", "certified"), _machine),
    "formats": (
        ("format", "checkpoint", "dtype", "kernel", "replay, largest", "median", "fidelity", "MiB"),
        _formats,
    ),
    "ways": (("checkpoint", "dtype", "batches", "compiled", "noise floor"), _ways),
    "batch-invariant": (("checkpoint", "dtype", "batches"), _batches),
    "runner-v1": (("checkpoint", "dtype", "fidelity"), _scores),
    "runner-v2": (("checkpoint", "dtype", "fidelity"), _scores),
    "reference": (
        ("checkpoint", "dtype", "CPU, s", "GPU, s", "largest |Δ|", "mean |Δ|"),
        _references,
    ),
    "gate": (("verdict", "checks"), _gate),
    "sized": (("shape", "scheme", "tier", "s", "checks"), _sized),
    "forced": (("checkpoint", "disabled", "check", "verdict", "kernel", "since"), _forced),
    "speed": (
        ("shape", "scheme", "work", "mode", "tokens/s", "score is × it",
         "of prefill + product", "MiB above prefill"),
        _speed,
    ),
    "head": (
        ("shape", "rows", "candidate", "ms", "× cuBLAS", "largest error", "moved by its batch"),
        _head,
    ),
}  # fmt: skip
