"""`kld`: how far a model's next-token distributions are from its base's, on any text.

Each model runs once, alone, and leaves the hidden states of the scored tokens on disk. The
divergence is then computed from them and the two heads, chunk by chunk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from quantgate.atomic import write_atomically
from quantgate.commands import models, texts
from quantgate.commands.kld_picture import Bin, picture
from quantgate.errors import BadInput
from quantgate.judging.llama_cpp import Estimate, llama_cpp_statistics
from quantgate.judging.stats import clustered_mean
from quantgate.measuring.divergence import Divergence, Side, divergence
from quantgate.measuring.reference import read_head
from quantgate.measuring.reference_device import choose_device, room_on
from quantgate.measuring.states import (
    MANIFEST,
    Model,
    States,
    TextInfo,
    measure_states,
    read_states,
    require_same_tokenizer,
    require_same_windows,
    require_usable,
)

POSITIONS, CONFIDENCES = 16, 10
MEANS = ("Mean KLD", "Mean ln(PPL(Q)/PPL(base))")


@dataclass(frozen=True)
class Comparison:
    """A model's distributions compared with its base's, token by token."""

    found: Divergence
    documents: NDArray[np.int64]
    """The document of each token, by number [n]."""
    positions: NDArray[np.int64]
    """Position in its window of each token [n]."""

    @property
    def statistics(self) -> dict[str, Estimate]:
        """llama.cpp's statistics, by its names."""
        return llama_cpp_statistics(self.found)

    @property
    def errors_over_documents(self) -> dict[str, float | None]:
        """Standard errors of two means that allow any dependence within a document or window.

        llama.cpp's treat tokens as independent. None for a single document.
        """
        rows = np.bincount(self.documents)
        columns = (self.found.kld, self.found.logprob_base - self.found.logprob)
        sums = (np.bincount(self.documents, weights=column) for column in columns)
        if len(rows) < 2:
            return dict.fromkeys(MEANS)
        return {
            name: clustered_mean(one, rows).clustered_error
            for name, one in zip(MEANS, sums, strict=True)
        }

    @property
    def by_position(self) -> list[Bin]:
        """The divergence in equal ranges of positions."""
        width = -(-(int(self.positions.max()) + 1) // POSITIONS)
        return self._binned(self.positions // width, width)

    @property
    def by_confidence(self) -> list[Bin]:
        """The divergence in equal ranges of the base's largest probability."""
        places = np.minimum((self.found.confidence * CONFIDENCES).astype(int), CONFIDENCES - 1)
        return self._binned(places, 1 / CONFIDENCES)

    def _binned(self, places: NDArray[np.int64], width: float) -> list[Bin]:
        bins = []
        for place in np.unique(places).tolist():
            there = places == place
            kld, n = self.found.kld[there], int(there.sum())
            error = float(kld.std(ddof=1) / np.sqrt(n)) if n > 1 else None
            same = float(self.found.same_top[there].mean())
            bins.append(Bin(place * width, (place + 1) * width, n, float(kld.mean()), error, same))
        return bins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options but the model."""
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", metavar="PATH_OR_ID", help="the unquantized model")
    base.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="compare with what --save-base has kept, and do not run the base again",
    )
    parser.add_argument(
        "--save-base",
        type=Path,
        metavar="DIR",
        help="keep what the base computes, to compare other quantizations --against it",
    )
    texts.add_arguments(parser, protocol="llama.cpp")
    models.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="draw the KLD by position and confidence"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and, if asked for, write the figures and the picture."""
    if arguments.picture is not None and arguments.picture.suffix != ".svg":
        raise BadInput(f"--picture {arguments.picture}: pictures are SVG; name it FILE.svg.")
    report, comparison = measure(arguments)
    Console().print(table(report))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(report, indent=2) + "\n")
    if arguments.picture is not None:
        title = f"{report['model']['path']} against {report['base']['path']}"
        write_atomically(
            arguments.picture, picture(title, comparison.by_position, comparison.by_confidence)
        )
    return 0


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], Comparison]:
    """Run the base, unless it is saved, and the model; return the report and its values."""
    with tempfile.TemporaryDirectory(prefix="quantgate-kld-") as scratch:
        model = _model(arguments)
        if arguments.against is not None:
            base_states, base = _saved_base(arguments, model)
        else:
            into = arguments.save_base or Path(scratch) / "base"
            base_states, base = _new_base(arguments, model, into)
        model = models.with_context(model, _longest(base_states))
        require_same_tokenizer(
            model.checkpoint.directory, base.checkpoint.directory, base_states.manifest.tokenizer
        )
        with models.shown_progress("the model") as progress:
            states = measure_states(
                model,
                base_states.windows(),
                base_states.manifest.text,
                Path(scratch) / "model",
                progress,
            )
        started = time.perf_counter()
        comparison = compare(base_states, base, states, model)
        seconds = time.perf_counter() - started
        return _report(base_states, states, comparison, seconds), comparison


def compare(base_states: States, base: Model, states: States, model: Model) -> Comparison:
    """Return how far one model's states are from a base's over the same windows."""
    device = choose_device()
    with room_on(device):
        heads = [read_head(one.checkpoint.directory, device) for one in (base, model)]
        _require_common_tokens(base_states, min(vocabulary for _, vocabulary in heads))
        parts: list[Divergence] = []
        documents: list[NDArray[np.int64]] = []
        positions: list[NDArray[np.int64]] = []
        numbers: dict[str, int] = {}
        for ours, theirs in zip(base_states.chunks(), states.chunks(), strict=True):
            left, right = (
                Side(chunk.hidden, *head) for chunk, head in zip((ours, theirs), heads, strict=True)
            )
            parts.append(divergence(left, right, ours.targets, device))
            for window in ours.windows:
                number = numbers.setdefault(window.document, len(numbers))
                documents.append(np.full(window.scored, number))
                positions.append(np.arange(window.score_from, len(window.ids)))
    return Comparison(_joined(parts), np.concatenate(documents), np.concatenate(positions))


def _joined(parts: list[Divergence]) -> Divergence:
    names = ("kld", "logprob", "logprob_base", "same_top", "confidence")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    found = dataclasses.replace(parts[0], **columns)
    if not np.isfinite(found.kld).all():
        count = int(np.count_nonzero(~np.isfinite(found.kld)))
        raise BadInput(
            f"{count} of {len(found.kld)} distributions are not finite: the checkpoint, its base "
            "or a kernel is broken, and a mean would hide it; gate the checkpoint to find where."
        )
    return found


def _require_common_tokens(states: States, common: int) -> None:
    largest = max(max(window.ids) for window in states.windows())
    if largest >= common:
        raise BadInput(
            f"{states.manifest.text.source}: token {largest} is in one of the two vocabularies "
            f"only, whose first {common} tokens are common; the models have no common text."
        )


# Models and texts --------------------------------------------------------------------------------


def _model(arguments: argparse.Namespace) -> Model:
    model = models.model_of(arguments, arguments.base)
    if model.checkpoint.base is None and arguments.against is None:
        raise BadInput(
            f"{arguments.model}: no base is named; give --base PATH_OR_ID, or --against DIR with a "
            "saved one."
        )
    return model


def _new_base(arguments: argparse.Namespace, model: Model, into: Path) -> tuple[States, Model]:
    if (into / MANIFEST).exists():
        raise BadInput(
            f"--save-base {into}: holds saved states already; use them with --against, or give "
            "another directory."
        )
    checkpoint = model.checkpoint.base_checkpoint
    assert checkpoint is not None  # `_model` has asked for it
    base = models.run_of(checkpoint, arguments.dtype, model.engine)
    text = texts.text_of(arguments, arguments.project)
    windows = text.documents(
        models.tokenizer_or_refuse(base.checkpoint.directory), base.checkpoint.directory
    )
    base = models.with_context(base, text.protocol.context)
    info = TextInfo(text.source, _named(text))
    with models.shown_progress("the base") as progress:
        return measure_states(base, windows, info, into, progress), base


def _saved_base(arguments: argparse.Namespace, model: Model) -> tuple[States, Model]:
    if arguments.save_base is not None:
        raise BadInput("--save-base goes with --base; --against has a saved one.")
    states = read_states(arguments.against)
    checkpoint = dataclasses.replace(model.checkpoint, base=states.manifest.model).base_checkpoint
    assert checkpoint is not None
    base = models.run_of(checkpoint, arguments.dtype, model.engine)
    require_usable(states, base)
    if texts.is_given(arguments):
        text = texts.text_of(arguments, arguments.project)
        windows = text.documents(
            models.tokenizer_or_refuse(base.checkpoint.directory), base.checkpoint.directory
        )
        require_same_windows(states, windows, TextInfo(text.source, _named(text)))
    return states, base


def _named(text: texts.Text) -> str:
    return f"{text.protocol.name}: {text.protocol.description}"


def _longest(states: States) -> int:
    return max(len(window.ids) for window in states.windows())


# Results -----------------------------------------------------------------------------------------


def _report(base: States, states: States, comparison: Comparison, seconds: float) -> dict[str, Any]:
    ours = states.manifest
    return {
        "base": _described(base),
        "model": _described(states),
        "text": dataclasses.asdict(ours.text),
        "scored": ours.scored,
        "windows": len(np.unique(comparison.documents)),
        "statistics": {
            name: dataclasses.asdict(estimate) for name, estimate in comparison.statistics.items()
        },
        "errors_over_documents": comparison.errors_over_documents,
        "extra_tokens": comparison.found.extra,
        "by_position": [dataclasses.asdict(one) for one in comparison.by_position],
        "by_confidence": [dataclasses.asdict(one) for one in comparison.by_confidence],
        "compared_per_s": ours.scored / seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": dict(ours.versions),
    }


def _described(states: States) -> dict[str, Any]:
    held = states.manifest
    return {
        "path": held.model,
        "identity": held.identity,
        "engine": held.engine,
        "dtype": held.dtype,
        "platform": held.platform,
        "tokens": held.tokens,
        "tokens_per_s": held.tokens / held.seconds,
        "kernels": dict(held.kernels),
        "emulated": list(held.emulated),
    }


def table(report: dict[str, Any]) -> Table:
    """Return the statistics as a table, with what was measured as its caption."""
    base, model = report["base"], report["model"]
    emulated = sorted({*base["emulated"], *model["emulated"]})
    said = [
        f"{report['scored']:,} tokens scored of {model['tokens']:,}, {report['text']['source']}, "
        f"{report['text']['protocol']}",
        f"{model['engine']}, {base['dtype']} and {model['dtype']}; {model['tokens_per_s']:,.0f} "
        f"tokens/s, the base {base['tokens_per_s']:,.0f}",
    ]
    said += [f"emulated kernels: {', '.join(emulated)}"] if emulated else []
    shown = Table(
        title=f"{model['path']} against {base['path']}", caption="\n".join(said), min_width=60
    )
    shown.add_column("statistic")
    shown.add_column("value", justify="right")
    shown.add_column("±", justify="right")
    shown.add_column("± over documents", justify="right")
    for name, estimate in report["statistics"].items():
        scale, unit = (100, " %") if _is_share(name) else (1, "")
        errors = (estimate["error"], report["errors_over_documents"].get(name))
        cells = [f"{scale * e:.6f}{unit}" if e is not None else "" for e in errors]
        shown.add_row(name, f"{scale * estimate['value']:.6f}{unit}", *cells)
    return shown


def _is_share(name: str) -> bool:
    """Whether llama.cpp prints a statistic in percent."""
    return name.endswith(("Δp", "Same top p", "PPL(base)))"))
