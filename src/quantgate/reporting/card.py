"""`quantgate card`: a section for a model card, with metadata for the hub, from a `gate.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from quantgate.reporting.badge import badge
from quantgate.reporting.markdown import SIGN, escaped, markdown_table

FILES = ("card.md", "badge.svg")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# The hub's names of the tasks.
HUB_TASKS = {
    "generate": "text-generation",
    "token_classify": "token-classification",
    "token_reward": "token-classification",
    "sequence_reward": "text-classification",
    "token_embed": "feature-extraction",
}
OF_BASE = " of the base"
LEGEND = (
    "Recovery is what is left of the unquantized model's figure; of a perplexity, the base's "
    "divided by the checkpoint's. ± is one standard error. All figures are of the same tokens, "
    "scored by vLLM as it serves each model."
)


@dataclass(frozen=True)
class Row:
    """A figure of a checkpoint beside its base's, as a line of the table and a metric of the hub.

    `recovery` is in percent, and `error` its standard error or, without a recovery, `value`'s.
    """

    name: str
    metric: str
    value: float
    base: float | None = None
    recovery: float | None = None
    error: float | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """Return the line of the table: the name, the base's, the checkpoint's, the recovery."""
        base = "" if self.base is None else f"{self.base:.4f}"
        if self.recovery is None:
            return self.name, base, _with_error(self.value, self.error), ""
        return self.name, base, f"{self.value:.4f}", f"{_with_error(self.recovery, self.error)} %"

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the metrics of `model-index`."""
        error = {} if self.error is None else {"args": {"standard_error": _rounded(self.error)}}
        value = {"type": self.metric, "value": _rounded(self.value), "name": self.name}
        if self.recovery is None:
            yield value | error
            return
        yield value
        name = f"recovery of {self.name}, in percent of the base"
        yield {"type": "recovery", "value": _rounded(self.recovery), "name": name, **error}


def write_card(
    report: Path, *, checkpoint: str | None = None, base: str | None = None, name: str | None = None
) -> list[Path]:
    """Write card.md and badge.svg beside a report's gate.json; return their paths.

    `checkpoint` is needed if the report has several; `base` is the base's id on the hub if the
    report names a directory, and `name` the model's if it is not the checkpoint's id. Raises
    `BadInput` for a report that has no card in it.
    """
    content = read_report(report / "gate.json")
    judged = _chosen(content, checkpoint, report)
    if judged["verdict"] == "pass" and judged.get("released") is False:
        raise BadInput(
            f"{judged['id']} passed in tier {judged['tier']}, but a release of it needs tier "
            f"{judged['required_tier']}; run `quantgate gate` in that tier first."
        )
    base = _base_id(judged, base)
    rows = recoveries(judged)
    if not rows:
        raise BadInput(
            f"{report / 'gate.json'}: neither quality nor divergence-from-base of {judged['id']} "
            "was measured, so there is no recovery to tell of; run `quantgate gate` with --base "
            "and without -k."
        )
    texts = (
        card(content, judged, rows, base, name or judged["id"]),
        badge("quantgate", _in_a_word(judged, rows), judged["verdict"]),
    )
    paths = [report / file for file in FILES]
    for path, text in zip(paths, texts, strict=True):
        write_atomically(path, text)
    return paths


def read_report(path: Path) -> dict[str, Any]:
    """Read a `gate.json`; `BadInput` if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for judged in content["checkpoints"]:
            _ = judged["id"], judged["base"], judged["checks"], SIGN[judged["verdict"]]
    except FileNotFoundError:
        raise BadInput(f"{path}: no report there; `quantgate gate` writes it.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: not a gate.json of this version ({type(error).__name__}: {error}); run "
            "`quantgate gate` again."
        ) from None
    return dict(content)


def recoveries(judged: Mapping[str, Any]) -> list[Row]:
    """Return the finite figures of a checkpoint's entry that compare it with its base."""
    figures = {check["name"]: check["figures"] for check in judged["checks"]}
    quality = {k: float(v) for k, v in figures.get("quality", {}).items()}
    divergence = {k: float(v) for k, v in figures.get("divergence-from-base", {}).items()}
    names = [key.removesuffix(OF_BASE) for key in quality if key.endswith(OF_BASE)]
    rows = [_of_quality(name, quality) for name in names]
    if "Same top p" in divergence:
        same, error = (100 * divergence.get(k, math.nan) for k in ("Same top p", "± Same top p"))
        rows.append(Row("same most probable token, %", "top_1_agreement", same, error=error))
    if "Mean KLD" in divergence:
        kld, error = (divergence.get(k, math.nan) for k in ("Mean KLD", "± Mean KLD"))
        name = "KL divergence from the base, nat per token"
        rows.append(Row(name, "kl_divergence", kld, error=error))
    return [row for row in rows if math.isfinite(row.value) and math.isfinite(row.error or 0.0)]


def card(
    report: Mapping[str, Any], judged: Mapping[str, Any], rows: list[Row], base: str, name: str
) -> str:
    """Return the section, after a block of metadata that belongs at the top of a README.md."""
    environment = ", ".join(f"{k} {v}" for k, v in report["environment"].items())
    passed = [check["verdict"] for check in judged["checks"]].count("pass")
    lines = [
        "---",
        *_yaml(_metadata(judged, rows, base, name)),
        "---",
        "",
        "## Release gate",
        "",
        f"![quantgate: {_in_a_word(judged, rows)}](badge.svg)",
        "",
        f"{SIGN[judged['verdict']]} **{judged['verdict'].upper()}**: {escaped(judged['scheme'])} "
        f"beside {escaped(base)}; {passed} of {len(judged['checks'])} checks pass "
        f"({escaped(report['started'][:10])}, {escaped(environment)}).",
        "",
        markdown_table(
            ("", "base", "quantized", "recovery"),
            [tuple(map(escaped, row.cells())) for row in rows],
        ),
        LEGEND,
    ]
    if judged["emulated"]:
        kernels = ", ".join(map(escaped, judged["emulated"]))
        lines += ["", f"Emulated, no evidence about a real kernel: {kernels}."]
    return "\n".join(lines) + "\n"


def _metadata(judged: Mapping[str, Any], rows: list[Row], base: str, name: str) -> dict[str, Any]:
    tokens = next((check["n"] for check in judged["checks"] if check["name"] == "quality"), None)
    dataset = {"type": "quantgate-probe", "name": "quantgate's probe", "args": {"n": tokens}}
    # An earlier version's gate.json does not name them.
    for probe in judged.get("probes", ()):
        if probe["tokens"] == tokens:
            dataset["name"] = f"quantgate's probe {probe['name']}"
            dataset["args"] = {"n": tokens, "sha256": probe["sha256"]}
    result = {
        "task": {"type": HUB_TASKS[judged["task"]]},
        "dataset": dataset,
        "metrics": [metric for row in rows for metric in row.metrics()],
    }
    index = [{"name": name, "results": [result]}]
    return {"base_model": base, "base_model_relation": "quantized", "model-index": index}


def _of_quality(name: str, figures: Mapping[str, float]) -> Row:
    """Return a row of `quality`: a perplexity, or a task's metric, of which more is better."""
    value, base = figures[name], figures[name + OF_BASE]
    if name == "perplexity":
        recovery = math.exp(-figures["mean ΔNLL"])
        error = recovery * figures["± mean ΔNLL"]  # d exp(x) = exp(x) dx
    else:
        recovery = value / base if base else math.nan
        error = figures[f"± loss of {name}"] / base if base else math.nan
    return Row(name, name.replace(" ", "_"), value, base, 100 * recovery, 100 * error)


def _chosen(report: Mapping[str, Any], name: str | None, directory: Path) -> dict[str, Any]:
    judged = {one["id"]: one for one in report["checkpoints"]}
    if name is None and len(judged) == 1:
        return dict(next(iter(judged.values())))
    if name not in judged:
        asked = "give --checkpoint" if name is None else f"--checkpoint {name}: not in it"
        raise BadInput(f"{directory}: {asked}; the report has {', '.join(judged) or 'none'}.")
    return dict(judged[name])


def _base_id(judged: Mapping[str, Any], given: str | None) -> str:
    """Return the id of the base on the hub."""
    if given is None and judged["base"] is None:
        raise BadInput(
            f"{judged['id']} was judged without a base, so there is nothing to compare it with; "
            "run `quantgate gate` with --base."
        )
    base = given if given is not None else str(judged["base"])
    if not HUB_ID.fullmatch(base):
        raise BadInput(
            f"the base '{base}' is no id on the hub, which a card must name; give "
            "--base ORGANIZATION/MODEL."
        )
    return base


def _in_a_word(judged: Mapping[str, Any], rows: list[Row]) -> str:
    """Return the verdict and, if the checkpoint passed, the first recovery."""
    said = str(judged["verdict"])
    recovery = rows[0].recovery
    return f"{said}, {recovery:.1f} %" if said == "pass" and recovery is not None else said


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _with_error(value: float, error: float | None) -> str:
    """Return a value with its standard error, both to the error's second significant digit.

    >>> _with_error(99.54468, 0.0677)
    '99.545 ± 0.068'
    """
    if error is None or not error > 0:
        return f"{value:.6g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _yaml(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield nested dicts and lists as YAML, line by line; strings are quoted as in JSON."""
    indent = "  " * depth
    if isinstance(value, list):
        for item in value:
            first, *others = _yaml(item, depth + 1)
            yield f"{indent}- {first.lstrip()}"
            yield from others
        return
    for key, inner in value.items():
        if isinstance(inner, dict | list):
            yield f"{indent}{key}:"
            yield from _yaml(inner, depth + 1)
        else:
            yield f"{indent}{key}: {_scalar(inner)}"


def _scalar(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    # YAML 1.1 reads 1e-05 as a string.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
