"""`ppl`: the perplexity of a model as vLLM serves it, by a published protocol."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from quantgate.atomic import write_atomically
from quantgate.commands import models, texts
from quantgate.commands.perplexity import Perplexity, Tally, result_of, score_all
from quantgate.errors import BadInput
from quantgate.measuring.engine import running_engine
from quantgate.measuring.engine_failure import first_line
from quantgate.measuring.environment import library_versions
from quantgate.measuring.session import kernel_fingerprint
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.checkpoint_file import find_checkpoint, read_checkpoint_files
from quantgate.subject.passage import tokenizer_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options but the model."""
    texts.add_arguments(parser, protocol="sliding")
    parser.add_argument(
        "--quantization", metavar="NAME", help="vLLM's name of it (default: from config.json)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of activations and KV cache (default: the model's own)"
    )
    parser.add_argument("--tensor-parallel-size", type=int, metavar="RANKS", help=models.RANKS)
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and, if asked for, write the result."""
    project = getattr(arguments, "project", Path.cwd())
    model, settings = _served(arguments, project)
    report = measure(model, settings, arguments, texts.text_of(arguments, project))
    show(report)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(report, indent=2) + "\n")
    return 0


def _served(arguments: argparse.Namespace, project: Path) -> tuple[str, EngineSettings]:
    """Return the model, and the settings of its file if it is given by a file's name."""
    known = read_checkpoint_files(project)
    checkpoint = find_checkpoint(arguments.model, known, project, None)
    model = str(checkpoint.directory) if arguments.model in known else arguments.model
    return model, models.settings_of(checkpoint, arguments)


def tokenizer_for(model: str) -> Any:
    """Return a model's tokenizer, or raise `BadInput`."""
    try:
        return tokenizer_of(Path(model))
    except Exception as error:
        raise BadInput(
            f"{model}: no tokenizer to be had ({type(error).__name__}: {first_line(error)})."
        ) from error


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[Tally], None]]:
    """Show scored tokens, speed and the perplexity so far on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("scoring", total=None)

        def update(tally: Tally) -> None:
            speed = tally.tokens / (time.perf_counter() - started)
            nll = tally.total / max(1, tally.tokens)
            progress.update(
                task,
                description=f"{tally.tokens:,} tokens scored, {speed:,.0f} tokens/s, "
                f"perplexity so far {math.exp(min(nll, 700)):.4f}",
            )

        yield update


def measure(
    model: str, settings: EngineSettings, arguments: argparse.Namespace, text: texts.Text
) -> dict[str, Any]:
    """Load the model, score the text, and return the report."""
    tokenizer = tokenizer_for(model)
    tally = Tally()
    windows = text.windows(tokenizer, Path(model), tally)
    with (
        running_engine(
            Path(model),
            settings=dataclasses.replace(settings, max_model_len=text.protocol.context),
            dtype=arguments.dtype,
            quantization=arguments.quantization,
        ) as llm,
        shown_progress() as progress,
    ):
        kernels, emulated = kernel_fingerprint(llm)
        dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
        started = time.perf_counter()
        score_all(llm, windows, tally, progress=progress)
        seconds = time.perf_counter() - started
    return {
        "model": model,
        "text": text.source,
        "protocol": {"name": text.protocol.name, "scored": text.protocol.description},
        "dtype": dtype,
        **dataclasses.asdict(result_of(tally, text.protocol)),
        "tokens_per_s": tally.tokens / seconds,
        "kernels": kernels,
        "emulated": list(emulated),
        "versions": library_versions(),
    }


def show(report: dict[str, Any]) -> None:
    """Print the result."""
    result = Perplexity(**{f.name: report[f.name] for f in dataclasses.fields(Perplexity)})
    protocol = report["protocol"]
    error = (
        "(one window: no standard error)"
        if result.standard_error is None
        else (
            f"± {result.standard_error:.4f} (standard error over windows; "
            f"± {result.standard_error_iid:.4f} over tokens)"
        )
    )
    print(f"protocol {protocol['name']}: {protocol['scored']}")
    print(f"scored {result.tokens:,} tokens, windows: {result.windows:,}, {report['dtype']}")
    print(f"perplexity {result.perplexity:.4f} {error}")
    print(f"NLL {result.nll:.6f} nat per token")
    if result.bits_per_byte is not None and result.word_perplexity is not None:
        print(f"{result.bits_per_byte:.4f} bits per byte")
        print(f"word perplexity {result.word_perplexity:.4f}")
    print(f"{report['tokens_per_s']:,.0f} scored tokens/s")
    if report["emulated"]:
        print(f"emulated kernels: {', '.join(report['emulated'])}")
