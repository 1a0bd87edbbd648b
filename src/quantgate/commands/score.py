"""`score`: the log-probability and the rank of each token of a text, as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from quantgate.commands import models, texts
from quantgate.errors import BadInput
from quantgate.measuring.divergence import CHUNK_BYTES
from quantgate.measuring.reference import Head, read_head
from quantgate.measuring.reference_device import choose_device, exactly, room_on
from quantgate.measuring.states import Chunk, States, TextInfo, measure_states
from quantgate.subject.probe import Window

if TYPE_CHECKING:
    import torch


class Ranked(NamedTuple):
    """Scored tokens [n]."""

    logprob: Sequence[float]
    """Natural-log probability."""
    rank: Sequence[int]
    """1 for the most probable token; tokens that are as probable do not count."""


@dataclass(frozen=True)
class Line:
    """One line of input: what is scored, and what it is scored after."""

    prompt: str
    continuation: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options but the model."""
    texts.add_arguments(parser, protocol="sliding")
    parser.add_argument(
        "--jsonl",
        type=Path,
        metavar="FILE",
        help='lines {"prompt": …, "continuation": …} or {"text": …} to score instead of a text',
    )
    models.add_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; else stdout")


def run(arguments: argparse.Namespace) -> int:
    """Score, and write one JSON object a token."""
    if arguments.jsonl is not None and texts.is_given(arguments):
        raise BadInput("--jsonl is a text of its own; leave the other one out.")
    model = models.model_of(arguments, base=None)
    directory = model.checkpoint.directory
    tokenizer = models.tokenizer_or_refuse(directory)
    if arguments.jsonl is not None:
        lines = list(line_windows(read_jsonl(arguments.jsonl), tokenizer, arguments.jsonl))
        info, windows = TextInfo(str(arguments.jsonl), "lines"), iter(lines)
        longest = max(len(window.ids) for window in lines)
    else:
        text = texts.text_of(arguments, arguments.project)
        windows = text.documents(tokenizer, directory)
        info, longest = TextInfo(text.source, text.protocol.name), text.protocol.context
    model = models.with_context(model, longest)
    with tempfile.TemporaryDirectory(prefix="quantgate-score-") as scratch:
        with models.shown_progress("scoring") as progress:
            states = measure_states(model, windows, info, Path(scratch), progress)
        with _opened(arguments.out) as out:
            for record in records(states, tokenizer):
                print(json.dumps(record), file=out)
    return 0


def read_jsonl(path: Path) -> list[Line]:
    """Read prompts and continuations; `BadInput` names the first line that is neither."""
    found = []
    try:
        content = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--jsonl {path}: not a readable UTF-8 file ({error}).") from None
    for number, line in enumerate(content, start=1):
        try:
            given = json.loads(line)
            keys = ("text",) if "text" in given else ("prompt", "continuation")
            values = [given[key] for key in keys]
            if not all(isinstance(value, str) for value in values):
                raise TypeError("a value is no string")
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(
                f'{path}:{number}: neither {{"text": …}} nor {{"prompt": …, "continuation": …}} '
                f"({type(error).__name__}: {error})."
            ) from None
        found.append(Line("" if keys == ("text",) else values[0], values[-1]))
    if not found:
        raise BadInput(f"--jsonl {path}: no lines in it.")
    return found


def line_windows(lines: Sequence[Line], tokenizer: Any, path: Path) -> Iterator[Window]:
    """Yield a window for each line; the tokens of its continuation are scored.

    Prompt and continuation are tokenized together; the token that spans their border is scored. A
    text without a prompt is scored from its second token on, or after BOS from the first.
    """
    for number, line in enumerate(lines, start=1):
        ids = tuple(tokenizer(line.prompt + line.continuation)["input_ids"])
        before = len(_common(ids, tokenizer(line.prompt)["input_ids"])) if line.prompt else 1
        score_from = max(1, before)
        if score_from >= len(ids):
            raise BadInput(
                f"{path}:{number}: nothing to score: {len(ids)} tokens, of which {score_from} are "
                "context."
            )
        yield Window(str(number - 1), "text", score_from, ids, "")


def _common(ids: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return the tokens with which both begin."""
    found = []
    for one, other in zip(ids, others, strict=False):
        if one != other:
            break
        found.append(one)
    return found


def records(states: States, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield a record for each scored token of the states, in order."""
    device = choose_device()
    with room_on(device):
        head = read_head(Path(states.manifest.model), device)
        for chunk in states.chunks():
            found = ranked(chunk, head, device)
            row = 0
            for window in chunk.windows:
                for position in range(window.score_from, len(window.ids)):
                    token = window.ids[position]
                    yield {
                        "document": window.document,
                        "position": position,
                        "id": token,
                        "token": tokenizer.decode([token]),
                        "logprob": found.logprob[row],
                        "rank": found.rank[row],
                    }
                    row += 1


def ranked(chunk: Chunk, head: Head, device: str) -> Ranked:
    """Return log-probabilities and ranks of a chunk's scored tokens, by the head in float32."""
    import torch

    logits_of, vocabulary = head
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    targets = torch.from_numpy(chunk.targets).to(device)
    logprobs: list[float] = []
    ranks: list[int] = []
    with exactly(torch.device(device)):
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits: torch.Tensor = logits_of(torch.from_numpy(chunk.hidden[part]).to(device))
            own = logits.gather(1, targets[part, None])
            logprobs += (own[:, 0] - logits.logsumexp(dim=-1)).tolist()
            ranks += (1 + (logits > own).sum(dim=-1)).tolist()
    return Ranked(logprobs, ranks)


def _opened(path: Path | None) -> Any:
    stdout: IO[str] = sys.stdout
    return nullcontext(stdout) if path is None else path.open("w", encoding="utf-8")
