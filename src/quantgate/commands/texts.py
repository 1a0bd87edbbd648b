"""The text that a command scores: a string, a file, a data set or a probe, cut by a protocol."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.commands.perplexity import PROTOCOLS, Protocol, ScoredWindow, Tally, all_windows
from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import first_line
from quantgate.subject.probe import Probe, Window, probe_file, probe_for, read_probe

# A text is tokenized in pieces of this many characters, cut at line ends. A text that fits into one
# piece is tokenized as a whole; a longer one does not have to fit into memory.
PIECE = 16 * 2**20
# What is scored if nothing else is given: the text of most published perplexities.
WIKITEXT, WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


@dataclass(frozen=True)
class Text:
    """What to score, and how it is cut."""

    source: str
    """Where it comes from, for reports."""
    protocol: Protocol
    arguments: argparse.Namespace
    probe: Probe | None = None

    def windows(self, tokenizer: Any, directory: Path, tally: Tally) -> Iterator[ScoredWindow]:
        """Cut the text into windows of token ids; `tally` counts the documents' bytes and words."""
        if self.probe is not None:
            windows = probe_for(self.probe, directory)[0].windows
            return (ScoredWindow(list(window.ids), window.score_from) for window in windows)
        return all_windows(
            read_texts(self.arguments, self.protocol), self.protocol, tokenizer, tally
        )

    def documents(self, tokenizer: Any, directory: Path) -> Iterator[Window]:
        """Return the same windows with their documents, the clusters of the statistics.

        Outside a probe each window is its own.
        """
        if self.probe is not None:
            return iter(probe_for(self.probe, directory)[0].windows)
        cut = self.windows(tokenizer, directory, Tally())
        return (
            Window(f"{number:06}", "text", window.score_from, tuple(window.ids), "")
            for number, window in enumerate(cut)
        )


def add_arguments(parser: argparse.ArgumentParser, *, protocol: str) -> None:
    """Add the options that say what is scored; `protocol` is the default one."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="score this text")
    source.add_argument("--text-file", type=Path, metavar="FILE", help="score a UTF-8 file")
    source.add_argument(
        "--dataset",
        metavar="NAME",
        help="score a data set: on the hub, in its cache, or a local folder (default, if no text "
        f"is given: {WIKITEXT}, {WIKITEXT_CONFIG})",
    )
    source.add_argument(
        "--probe", metavar="NAME_OR_FILE", help="score the windows of a probe of the gate"
    )
    parser.add_argument(
        "--dataset-config", metavar="NAME", help=f"of the data set, such as {WIKITEXT_CONFIG}"
    )
    parser.add_argument("--split", default="test", help="of the data set (default: test)")
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="of the data set (default: text)"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=protocol,
        help="how the text is cut into windows and what is scored of each, as in published "
        f"figures (default: {protocol})",
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="of a window (default: 2048; 512 for llama.cpp)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="for sliding: how far a window moves (default: a quarter of the context)",
    )
    parser.add_argument(
        "--rows", type=int, help="for exl3: how many to score, 0 for all (default: 100)"
    )


def is_given(arguments: argparse.Namespace) -> bool:
    """Whether the options name a text."""
    given = (arguments.text, arguments.text_file, arguments.dataset, arguments.probe)
    return any(one is not None for one in given)


def text_of(arguments: argparse.Namespace, project: Path) -> Text:
    """Return the text that the options name; settings of other protocols are refused."""
    protocol = protocol_of(arguments)
    if arguments.probe is not None:
        probe = read_probe(probe_file(project, arguments.probe))
        return Text(f"probe '{probe.name}'", _of_probe(probe), arguments, probe)
    if arguments.text is not None:
        return Text("--text", protocol, arguments)
    if arguments.text_file is not None:
        return Text(str(arguments.text_file), protocol, arguments)
    if arguments.dataset is None:
        arguments.dataset, arguments.dataset_config = WIKITEXT, WIKITEXT_CONFIG
    return Text(f"{_shown(arguments)}, {arguments.split}", protocol, arguments)


def _of_probe(probe: Probe) -> Protocol:
    def windows(_: Iterable[int], __: int | None) -> Iterator[ScoredWindow]:
        raise AssertionError("a probe is cut already")

    longest = max(len(window.ids) for window in probe.windows)
    described = f"the {len(probe.windows)} windows of probe '{probe.name}'"
    return Protocol("probe", longest, False, False, described, windows)


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

    shown = _shown(arguments)
    try:
        rows = datasets.load_dataset(
            arguments.dataset, arguments.dataset_config, split=arguments.split
        )
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


def _shown(arguments: argparse.Namespace) -> str:
    config = arguments.dataset_config
    return f"{arguments.dataset}/{config}" if config else str(arguments.dataset)
