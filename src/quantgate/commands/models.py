"""The model that `kld` and `score` run, from the command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import first_line
from quantgate.measuring.precision import SERVING, resolve_dtype
from quantgate.measuring.states import EngineName, Model
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.checkpoint_file import find_checkpoint, read_checkpoint_files
from quantgate.subject.files import refuse_another_task
from quantgate.subject.passage import tokenizer_of
from quantgate.subject.task import GENERATE

RANKS = "vLLM's ranks, a GPU each (default: what the checkpoint's file says, and 1 without one)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is run."""
    parser.add_argument(
        "--engine",
        choices=("vllm", "hf"),
        default="vllm",
        help="vLLM with the kernels that serve the model (default), or HF modules over the weights",
    )
    parser.add_argument(
        "--dtype", default=SERVING, help="of activations (default: the one that it is served in)"
    )
    parser.add_argument("--tensor-parallel-size", type=int, metavar="RANKS", help=RANKS)
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile a model")


def model_of(arguments: argparse.Namespace, base: str | None) -> Model:
    """Return the model that the command line names, with its base if that is given."""
    known = read_checkpoint_files(arguments.project)
    checkpoint = find_checkpoint(arguments.model, known, arguments.project, base)
    checkpoint = dataclasses.replace(checkpoint, engine=settings_of(checkpoint, arguments))
    return run_of(checkpoint, arguments.dtype, arguments.engine)


def settings_of(checkpoint: Checkpoint, arguments: argparse.Namespace) -> EngineSettings:
    """Return the engine settings of a checkpoint's file, with those of the command line."""
    settings = checkpoint.engine
    more: dict[str, Any] = {"enforce_eager": settings.enforce_eager or arguments.enforce_eager}
    if arguments.tensor_parallel_size is not None:
        more["tensor_parallel_size"] = arguments.tensor_parallel_size
    return dataclasses.replace(settings, **more)


def run_of(checkpoint: Checkpoint, dtype: str, engine: EngineName) -> Model:
    """Return a run of a checkpoint in a dtype; it must be a generative model."""
    refuse_another_task(checkpoint.directory, GENERATE)
    return Model(checkpoint, resolve_dtype(checkpoint, dtype), engine)


def with_context(model: Model, longest: int) -> Model:
    """Return a model whose engine takes prompts of `longest` tokens, unless its file says more."""
    settings = model.checkpoint.engine
    if settings.max_model_len is None:
        settings = dataclasses.replace(settings, max_model_len=longest)
    checkpoint = dataclasses.replace(model.checkpoint, engine=settings)
    return dataclasses.replace(model, checkpoint=checkpoint)


def tokenizer_or_refuse(directory: Path) -> Any:
    """Return a model's tokenizer, or raise `BadInput`."""
    try:
        return tokenizer_of(directory)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{directory}: its tokenizer cannot be loaded ({first_line(error)}); copy the "
            "tokenizer files from the base."
        ) from None


@contextlib.contextmanager
def shown_progress(what: str) -> Iterator[Callable[[int], None]]:
    """Show the tokens done and the speed on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{what}: loading", total=None)
        started = time.perf_counter()

        def update(tokens: int) -> None:
            nonlocal started
            if not tokens:  # it is loaded
                started = time.perf_counter()
                return
            speed = tokens / (time.perf_counter() - started)
            progress.update(task, description=f"{what}: {tokens:,} tokens, {speed:,.0f} tokens/s")

        yield update
