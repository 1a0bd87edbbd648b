"""Perplexity of a model in vLLM's score mode, under the protocol of a published number.

    python tools/perplexity.py --model build/tiny-llama-w4a16 --text-file corpus.txt
    python tools/perplexity.py --model org/model --dataset wikitext \\
        --dataset-config wikitext-2-raw-v1 --protocol llama.cpp

The first line says which tokens were scored. Texts longer than memory are streamed.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from quantgate.atomic import write_atomically
from quantgate.commands.perplexity import (
    PROTOCOLS,
    Perplexity,
    Protocol,
    Tally,
    evaluate,
    result_of,
)
from quantgate.errors import BadInput
from quantgate.measuring.engine import running_engine
from quantgate.measuring.engine_failure import EngineFailure, first_line
from quantgate.measuring.environment import library_versions
from quantgate.measuring.session import kernel_fingerprint
from quantgate.subject.checkpoint import EngineSettings

# A text is tokenized in pieces of this many characters, cut at line ends. A text that fits into one
# piece is tokenized as a whole; a longer one does not have to fit into memory.
PIECE = 16 * 2**20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Perplexity in score mode, by a published protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory, or name on the hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text itself")
    source.add_argument("--text-file", type=Path, help="a UTF-8 text file, however long")
    source.add_argument("--dataset", help="a data set on the hub, in the cache, or a local folder")
    parser.add_argument("--dataset-config", help="such as wikitext-2-raw-v1")
    parser.add_argument("--split", default="test")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="sliding")
    parser.add_argument(
        "--context-length", type=int, help="tokens of a window (2048; 512 for llama.cpp)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="for sliding: tokens a window moves by (a quarter of the context)",
    )
    parser.add_argument("--rows", type=int, help="for exl3: the rows to score, 0 for all (100)")
    parser.add_argument("--quantization", help="vLLM's; read from the checkpoint when left out")
    parser.add_argument("--dtype", default="auto", help="of activations and KV cache")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    return parser.parse_args(arguments)


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """Return the protocol with its settings; settings of other protocols are refused."""
    name, given = arguments.protocol, {}
    if arguments.context_length is not None:
        given["context"] = arguments.context_length
    for option, owner in (("stride", "sliding"), ("rows", "exl3")):
        value = getattr(arguments, option)
        if value is None:
            continue
        if name != owner:
            raise BadInput(f"--{option} is for --protocol {owner}, got --protocol {name}.")
        given[option] = value
    if "rows" in given:
        given["rows"] = given["rows"] or None
    if (context := given.get("context", 2)) < 2:
        raise BadInput(f"--context-length must be at least 2, got {context}.")
    return PROTOCOLS[name](**given)


def read_texts(arguments: argparse.Namespace, protocol: Protocol) -> Iterator[str]:
    """Yield documents or, for a protocol that joins them, pieces of the whole text."""
    if arguments.text is not None:
        return iter([arguments.text])
    if arguments.text_file is not None:
        if not arguments.text_file.is_file():
            raise BadInput(f"--text-file {arguments.text_file}: no such file.")
        lines = read_lines(arguments.text_file)
        return iter(["".join(lines)]) if protocol.per_document else pieces(lines)
    documents = read_dataset(arguments)
    if protocol.per_document:
        return (text for text in documents if text)
    joined = (("" if number == 0 else "\n\n") + text for number, text in enumerate(documents))
    return pieces(joined)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--text-file {path}: not a readable UTF-8 text ({error}).") from None


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """Join parts into pieces of at least `PIECE` characters."""
    held: list[str] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def read_dataset(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a dataset's texts in order, one row at a time; the dataset is memory-mapped."""
    import datasets

    name = arguments.dataset
    shown = f"{name}/{arguments.dataset_config}" if arguments.dataset_config else name
    try:
        rows = datasets.load_dataset(name, arguments.dataset_config, split=arguments.split)
    except Exception as error:
        raise BadInput(
            f"data set {shown}, split {arguments.split}: not in the cache "
            f"({datasets.config.HF_DATASETS_CACHE}) and not to be had otherwise "
            f"({type(error).__name__}: {first_line(error)}); give --text-file FILE, "
            "--text TEXT, or --dataset a local folder of parquet, JSON or text files."
        ) from error
    if arguments.text_column not in rows.column_names:
        raise BadInput(
            f"data set {shown} has no column '{arguments.text_column}', only "
            f"{', '.join(rows.column_names)}; give --text-column."
        )
    return (row[arguments.text_column] for row in rows)


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


def measure(arguments: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """Load the model, score the text, and return the report."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    except Exception as error:
        raise BadInput(
            f"--model {arguments.model}: no tokenizer to be had ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error
    texts = read_texts(arguments, protocol)
    settings = EngineSettings(
        max_model_len=protocol.context,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enforce_eager=arguments.enforce_eager,
    )
    with (
        running_engine(
            arguments.model,
            settings=settings,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
        ) as llm,
        shown_progress() as progress,
    ):
        kernels, emulated = kernel_fingerprint(llm)
        dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
        started = time.perf_counter()
        tally = evaluate(llm, texts, protocol, tokenizer, progress=progress)
        seconds = time.perf_counter() - started
    return {
        "model": arguments.model,
        "protocol": {"name": protocol.name, "scored": protocol.description},
        "dtype": dtype,
        **dataclasses.asdict(result_of(tally, protocol)),
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


def main() -> int:
    """Command-line entry point; returns 2 on a user error."""
    arguments = parse_arguments()
    try:
        report = measure(arguments, protocol_of(arguments))
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
