"""Probes: fixed token ids that the engine, the reference and the base all score."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.errors import BadInput
from quantgate.subject.passage import Passage, in_one_line, tokenizer_of
from quantgate.subject.shipped import shipped
from quantgate.subject.task import GENERATE, SEQUENCE_REWARD, Task

if TYPE_CHECKING:
    from quantgate.subject.checkpoint import Checkpoint


@dataclass(frozen=True)
class Window:
    """One prompt: tokens `score_from` … end are scored, each given all tokens before it.

    For a pooling model these are the tokens whose outputs are used: only the last one if the model
    gives one output per text.
    """

    document: str
    stratum: str
    score_from: int
    ids: tuple[int, ...]
    text: str
    labels: tuple[int | None, ...] = ()
    """For each scored token, an index into the probe's labels, or a grade, or None; () if the probe
    has no expected answers."""
    chat: tuple[tuple[str, str], ...] = ()
    """For a conversation, its turns: role and content. A model with a chat template is given them
    through it, any other model `text`."""

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return len(self.ids) - self.score_from


@dataclass(frozen=True)
class Probe:
    """Windows of frozen token ids. Per-token arrays are over scored tokens, window by window."""

    name: str
    vocab_size: int
    windows: tuple[Window, ...]
    task: Task = GENERATE
    labels: tuple[str, ...] = ()
    """The label names."""
    tokenizer: Path | None = field(default=None, compare=False)
    """The checkpoint whose tokenizer decodes its ids, for messages."""
    file_sha256: str = field(default="", compare=False)
    """sha256 of the file that it was read from, or is a part or another tokenization of; "" if
    none."""

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of what is scored: ids, scored regions, documents, strata and labels."""
        content = [
            [w.document, w.stratum, w.score_from, list(w.ids), *([w.labels] if w.labels else [])]
            for w in self.windows
        ]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    @property
    def scored(self) -> int:
        """The number of scored tokens in all windows."""
        return sum(window.scored for window in self.windows)

    @functools.cached_property
    def documents(self) -> NDArray[np.str_]:
        """Document id of each scored token [n]: the clusters of the statistics."""
        return self._per_token([window.document for window in self.windows])

    @functools.cached_property
    def strata(self) -> NDArray[np.str_]:
        """Stratum of each scored token [n]."""
        return self._per_token([window.stratum for window in self.windows])

    @functools.cached_property
    def positions(self) -> NDArray[np.int64]:
        """Position in its window of each scored token [n]."""
        return np.concatenate([np.arange(w.score_from, len(w.ids)) for w in self.windows])

    @functools.cached_property
    def expected(self) -> NDArray[np.float64]:
        """The label or grade of each scored token [n]; NaN for those without one."""
        labels = [w.labels or (None,) * w.scored for w in self.windows]
        return np.array([np.nan if x is None else x for row in labels for x in row], np.float64)

    def _per_token(self, labels: Sequence[str]) -> NDArray[np.str_]:
        return np.repeat(np.array(labels), [window.scored for window in self.windows])


@dataclass(frozen=True)
class ScoredProbe:
    """What identifies a probe that was scored, for reports."""

    name: str
    file_sha256: str
    """Of the file that it comes from: the same for every tokenizer and tier."""
    sha256: str
    """`Probe.sha256` of what was scored: token ids, and where they are from."""
    documents: int
    windows: int
    tokens: int
    """Scored ones."""

    @classmethod
    def of(cls, probe: Probe) -> ScoredProbe:
        """Return what identifies a probe."""
        documents = len({window.document for window in probe.windows})
        sizes = (documents, len(probe.windows), probe.scored)
        return cls(probe.name, probe.file_sha256, probe.sha256, *sizes)

    @property
    def stored_name(self) -> str:
        """The name in its file, whatever tokenizer gave the ids."""
        return self.name.removesuffix(RETOKENIZED)


RETOKENIZED = "-retokenized"


def read_probe(path: Path) -> Probe:
    """Read a probe file: a JSON header line, then one JSON object per window.

    A window may have text alone, and gets its ids from each checkpoint's tokenizer.
    """
    try:
        content = path.read_bytes()
        header, *lines = [json.loads(line) for line in content.decode("utf-8").splitlines()]
        task: Task = header.get("task", GENERATE)
        first = 1 if task == GENERATE else 0
        windows = tuple(
            Window(
                w["document"],
                w["stratum"],
                w.get("score_from", first),
                tuple(w.get("ids", ())),
                w["text"],
                tuple(w.get("labels", ())),
                tuple((role, content) for role, content in w.get("chat", ())),
            )
            for w in lines
        )
        probe = Probe(
            header["probe"],
            header.get("vocab_size", 0),
            windows,
            task,
            tuple(header.get("labels", ())),
            file_sha256=hashlib.sha256(content).hexdigest(),
        )
    except FileNotFoundError:
        raise BadInput(f"{path}: no such probe.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a probe file ({type(error).__name__}: {error}).") from None
    for number, window in enumerate(windows, start=2):
        if not window.ids:
            continue  # only text: each checkpoint's own tokenizer gives the ids
        if not first <= window.score_from < len(window.ids):
            raise BadInput(
                f"{path}:{number}: score_from must be in {first} … {len(window.ids) - 1}."
            )
        if window.labels and len(window.labels) != window.scored:
            raise BadInput(
                f"{path}:{number}: {len(window.labels)} labels for {window.scored} scored tokens."
            )
        if not 0 <= min(window.ids) <= max(window.ids) < probe.vocab_size:
            raise BadInput(f"{path}:{number}: a token id is outside 0 … {probe.vocab_size - 1}.")
    if not windows:
        raise BadInput(f"{path}: the probe has no windows.")
    return probe


def probe_for(probe: Probe, directory: Path) -> tuple[Probe, str | None]:
    """Return the probe in a checkpoint's own token ids, and a note if that is a different probe.

    If the checkpoint's tokenizer gives the stored ids, the result is `probe` itself. Otherwise the
    probe's texts are tokenized once, here, so that everything in this run scores the same ids.
    """
    try:
        tokenizer = tokenizer_of(directory)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"{directory}: its tokenizer cannot be loaded ({reason}); download or export its "
            "tokenizer files again."
        ) from None
    encoded = [encode(tokenizer, window) for window in probe.windows]
    if encoded == [window.ids for window in probe.windows]:
        return dataclasses.replace(probe, tokenizer=directory), None
    if (bos := tokenizer.bos_token_id) is not None and any(
        ids[:2] == (bos, bos) for ids in encoded
    ):
        raise BadInput(
            f"{directory}: its tokenizer adds '{tokenizer.bos_token}' twice at the start of a "
            "text, but a model expects it once; correct tokenizer.json or its template."
        )
    first = 1 if probe.task == GENERATE else 0
    windows = tuple(
        _retokenized(window, ids, probe.task)
        for window, ids in zip(probe.windows, encoded, strict=True)
        if len(ids) > first
    )
    note = (
        f"probe '{probe.name}' tokenized with {directory.name}'s own tokenizer: "
        f"{sum(w.scored for w in windows)} scored tokens"
    )
    found = dataclasses.replace(
        probe,
        name=probe.name + RETOKENIZED,
        vocab_size=len(tokenizer),
        windows=windows,
        tokenizer=directory,
    )
    return found, note


# A template may write the day into a conversation; a probe must be the same every day.
CHAT_DATE = "01 Jan 2025"


def encode(tokenizer: Any, window: Window) -> tuple[int, ...]:
    """Return a window's token ids by a tokenizer, a conversation's through its chat template."""
    if not window.chat or not tokenizer.chat_template:
        return tuple(tokenizer(window.text)["input_ids"])
    turns = [{"role": role, "content": content} for role, content in window.chat]
    text = tokenizer.apply_chat_template(turns, tokenize=False, date_string=CHAT_DATE)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


CONTEXT_TOKENS = 16


def passage(probe: Probe, row: int) -> Passage:
    """Return a scored token with its context, escaped; only its id if no tokenizer is known."""
    ends = np.cumsum([window.scored for window in probe.windows])
    index = int(np.searchsorted(ends, row, side="right"))
    window, place = probe.windows[index], int(probe.positions[row])
    if probe.tokenizer is None:
        return Passage("", f"token {window.ids[place]}", "")
    tokenizer = tokenizer_of(probe.tokenizer)
    parts = (
        window.ids[max(0, place - CONTEXT_TOKENS) : place],
        window.ids[place : place + 1],
        window.ids[place + 1 : place + 1 + CONTEXT_TOKENS // 2],
    )
    return Passage(*(in_one_line(tokenizer.decode(list(ids))) for ids in parts))


def _retokenized(window: Window, ids: tuple[int, ...], task: Task) -> Window:
    """Return a window with other ids. Token labels are dropped; a whole text's grade is kept."""
    if task == SEQUENCE_REWARD:
        return dataclasses.replace(window, ids=ids, score_from=len(ids) - 1)
    first = 1 if task == GENERATE else 0
    return dataclasses.replace(window, ids=ids, score_from=first, labels=())


PROBES = Path("fixtures") / "probes"
# The embedded probe of each task.
EMBEDDED_PROBES: Mapping[Task, str] = {
    GENERATE: "tiny",
    "token_classify": "entities",
    "token_reward": "steps",
    "sequence_reward": "graded",
    "token_embed": "retrieval",
}


def stored_probe(checkpoint: Checkpoint, quality: bool = False, named: str | None = None) -> Probe:
    """Return the probe that a checkpoint is scored on, in the token ids that it is stored in.

    It is the one `named`, that of the checkpoint's file, or its task's embedded one. With
    `quality`, the larger one beside it, `<name>-quality`, if there is one.
    """
    name = named or checkpoint.probe
    if name is None:
        return embedded_probe(checkpoint.root, checkpoint.task, quality=quality)
    path = probe_file(checkpoint.root, name)
    larger = path.with_stem(f"{path.stem}-quality")
    probe = read_probe(larger if quality and larger.exists() else path)
    if probe.task != checkpoint.task:
        raise BadInput(
            f"{path}: a probe for task '{probe.task}', but {checkpoint.id} is judged at "
            f"'{checkpoint.task}'; give another probe."
        )
    return probe


def embedded_probe(root: Path, task: Task, *, quality: bool = False) -> Probe:
    """Return the probe for a task: the project's own in `fixtures/probes`, or quantgate's.

    With `quality`, the larger one on which the task's own metric is computed.
    """
    name = f"{EMBEDDED_PROBES[task]}{'-quality' if quality else ''}"
    return read_probe(probe_file(root, name))


def probe_file(root: Path, name: str) -> Path:
    """Return a probe's file: a path, or the name of one of the project's or of quantgate's own."""
    if name.startswith((".", "/", "~")) or name.endswith(".jsonl"):
        found = [root / Path(name).expanduser()]
    else:
        found = [folder / f"{name}.jsonl" for folder in (root / PROBES, shipped(str(PROBES)))]
    for path in found:
        if path.exists():
            return path
    there = sorted({path.stem for one in found for path in one.parent.glob("*.jsonl")})
    raise BadInput(f"{found[0]}: no such probe; give a path, or one of {', '.join(there)}.")
