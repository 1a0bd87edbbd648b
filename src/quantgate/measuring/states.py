"""Hidden states of a model over a text, in chunks on disk.

Distributions over the whole vocabulary are recomputed from them and the model's head, so one run
of a base serves any number of comparisons, and two models are never in memory together.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from quantgate.measuring import engine, environment, reference, session
from quantgate.measuring.codec import packed, unpacked
from quantgate.measuring.environment import library_versions
from quantgate.measuring.measurement import Provenance
from quantgate.measuring.reference_device import choose_device, platform_of
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import identity, read_config
from quantgate.subject.passage import tokenizer_of
from quantgate.subject.probe import Probe, Window

FORMAT = 1
MANIFEST = "states.json"
# float32 hidden states of one chunk. A chunk has at most MOST_TOKENS tokens, whatever their width.
CHUNK_BYTES = 128 << 20
MOST_TOKENS = 65536

EngineName = Literal["vllm", "hf"]
Score = Callable[[Probe], NDArray[np.float32]]
"""Returns the head's input [n, H] for a probe's scored tokens."""


@dataclass(frozen=True)
class Model:
    """A model and how it is run."""

    checkpoint: Checkpoint
    dtype: str
    """torch's name of it."""
    engine: EngineName = "vllm"
    """vLLM with the kernels that serve it, or HF modules over its dequantized weights."""


@dataclass(frozen=True)
class TextInfo:
    """Where windows come from."""

    source: str
    protocol: str


@dataclass(frozen=True)
class ChunkFile:
    """One file of states."""

    name: str
    sha256: str
    scored: int
    """Its number of scored tokens."""


@dataclass(frozen=True)
class Manifest:
    """What a directory of states holds, and everything that they depend on."""

    model: str
    identity: str
    """sha256 over the model's weights, config and tokenizer."""
    engine: EngineName
    dtype: str
    platform: str
    text: TextInfo
    windows: str
    """sha256 of what was scored: ids, scored regions and documents."""
    tokenizer: str
    """sha256 of the vocabulary."""
    versions: Mapping[str, str]
    kernels: Mapping[str, str]
    emulated: tuple[str, ...]
    tokens: int
    """All tokens of the windows, scored or not."""
    seconds: float
    """How long the model took for them, without loading."""
    chunks: tuple[ChunkFile, ...]
    format: int = FORMAT

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return sum(chunk.scored for chunk in self.chunks)


@dataclass(frozen=True)
class Chunk:
    """Some windows and the hidden states of their scored tokens."""

    windows: tuple[Window, ...]
    hidden: NDArray[np.float32]
    """The head's input [n, H]."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """The scored tokens [n]."""
        return np.concatenate([np.array(w.ids[w.score_from :], np.int64) for w in self.windows])


@dataclass(frozen=True)
class States:
    """A complete directory of states."""

    directory: Path
    manifest: Manifest

    def chunks(self) -> Iterator[Chunk]:
        """Read one chunk after another."""
        for file in self.manifest.chunks:
            path = self.directory / file.name
            yield Chunk(tuple(_read_windows(path)), unpacked(_array(path, "hidden")))

    def windows(self) -> Iterator[Window]:
        """Read the windows alone, chunk by chunk."""
        for file in self.manifest.chunks:
            yield from _read_windows(self.directory / file.name)


@dataclass
class _WindowsDigest:
    """The running sha256 of windows, and how many tokens they have."""

    tokens: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def add(self, window: Window) -> None:
        self._digest.update(_window_line(window).encode() + b"\n")
        self.tokens += len(window.ids)

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())


def measure_states(
    model: Model,
    windows: Iterable[Window],
    text: TextInfo,
    into: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> States:
    """Run a model over windows and store the states of their scored tokens in a directory.

    `progress` is called with the number of tokens done, 0 once the model is loaded. The manifest is
    written last: a directory without one is incomplete.
    """
    directory = model.checkpoint.directory
    (into / MANIFEST).unlink(missing_ok=True)
    files: list[ChunkFile] = []
    digest = _WindowsDigest()
    seconds = 0.0
    with _running(model) as (score, provenance):
        progress(0)
        for probe in chunked(windows, _tokens_in_chunk(directory)):
            started = time.perf_counter()
            hidden = score(probe)
            seconds += time.perf_counter() - started
            files.append(_write_chunk(into, len(files), Chunk(probe.windows, hidden)))
            for window in probe.windows:
                digest.add(window)
            progress(digest.tokens)
    if not files:
        raise BadInput(
            f"{text.source}: no token to score by protocol {text.protocol}; give a longer text or "
            "a smaller --context-length."
        )
    manifest = Manifest(
        model=str(directory),
        identity=identity(directory),
        engine=model.engine,
        dtype=model.dtype,
        platform=provenance.platform,
        text=text,
        windows=digest.hexdigest(),
        tokenizer=tokenizer_sha256(directory),
        versions=library_versions(),
        kernels=provenance.kernels,
        emulated=provenance.emulated,
        tokens=digest.tokens,
        seconds=seconds,
        chunks=tuple(files),
    )
    write_atomically(into / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
    return States(into, manifest)


def read_states(directory: Path) -> States:
    """Open a directory of states; `BadInput` if it holds none."""
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"{directory}: no {MANIFEST}, so it holds no complete states; write them with "
            "--save-base."
        ) from None
    except ValueError as error:
        raise BadInput(f"{path}: not a JSON file ({error}); save the base again.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadInput(f"{path}: not states of format {FORMAT}; save the base again.")
    try:
        return States(directory, msgspec.convert(found, Manifest))
    except msgspec.ValidationError as error:
        raise BadInput(f"{path}: {error}; save the base again.") from None


def require_usable(states: States, base: Model) -> None:
    """Raise `BadInput` unless states are what `base` would give here.

    Compares the base's files, library versions, engine, device and dtype, and the states' own files
    with what was written.
    """
    said, here, directory = states.manifest, states.directory, base.checkpoint.directory
    versions = library_versions()
    expected: dict[str, tuple[str, str]] = {
        "engine": (said.engine, base.engine),
        "device": (said.platform, platform_for(base.engine)),
        "dtype": (said.dtype, base.dtype),
    } | {
        name: (said.versions.get(name, "absent"), versions.get(name, "absent"))
        for name in sorted({*said.versions, *versions})
    }
    for name, (saved, now) in expected.items():
        if saved != now:
            raise BadInput(
                f"{here}: saved with {name} {saved}, but this run has {now}; save the base again."
            )
    if said.identity != (actual := identity(directory)):
        raise BadInput(
            f"{here}: saved from a base with identity sha256:{said.identity[:12]}…, but "
            f"{directory} has sha256:{actual[:12]}…; put the base back, or save it again."
        )
    _require_whole(states)


def _require_whole(states: States) -> None:
    for file in states.manifest.chunks:
        path = states.directory / file.name
        try:
            with path.open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise BadInput(
                f"{path}: cannot be read ({error.strerror}); save the base again."
            ) from None
        if actual != file.sha256:
            raise BadInput(f"{path}: not the file that was written; save the base again.")


def require_same_tokenizer(directory: Path, base: Path, expected: str) -> None:
    """Raise `BadInput` if a model's vocabulary is not the base's, whose sha256 is `expected`."""
    if tokenizer_sha256(directory) != expected:
        raise BadInput(
            f"{directory}: its tokenizer has other tokens than the one of {base}, so the same text "
            "is not the same tokens; compare tokenizer.json with the base's."
        )


def require_same_windows(states: States, windows: Iterable[Window], text: TextInfo) -> None:
    """Raise `BadInput` if states are not those of the given windows."""
    digest = _WindowsDigest()
    for window in windows:
        digest.add(window)
    if digest.hexdigest() != states.manifest.windows:
        saved = states.manifest.text
        raise BadInput(
            f"{states.directory}: saved from {saved.source} by protocol {saved.protocol} "
            f"({states.manifest.tokens} tokens), which is not {text.source} by protocol "
            f"{text.protocol} ({digest.tokens} tokens); leave the text out, or save the base again."
        )


def tokenizer_sha256(directory: Path) -> str:
    """Return the sha256 of a checkpoint's vocabulary; `BadInput` if it has no tokenizer."""
    try:
        tokenizer = tokenizer_of(directory)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{directory}: its tokenizer cannot be loaded ({reason}); copy the tokenizer files "
            "from the base."
        ) from None
    content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()


def platform_for(engine_name: EngineName) -> str:
    """Return the platform that a run here computes on: "cpu", "sm90", …"""
    if engine_name == "hf":
        return platform_of(choose_device())
    ((_, platform),) = environment.available_devices().items()
    return platform


def chunked(windows: Iterable[Window], most: int) -> Iterator[Probe]:
    """Group windows into probes of at most `most` tokens, or of a single longer window."""
    held: list[Window] = []
    size = 0
    for window in windows:
        if held and size + len(window.ids) > most:
            yield _probe(held)
            held, size = [], 0
        held.append(window)
        size += len(window.ids)
    if held:
        yield _probe(held)


def _probe(windows: list[Window]) -> Probe:
    return Probe("text", 1 + max(max(window.ids) for window in windows), tuple(windows))


def _tokens_in_chunk(directory: Path) -> int:
    config = read_config(directory)
    width = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size", 8192)
    return max(1, min(MOST_TOKENS, CHUNK_BYTES // (4 * int(width))))


@contextmanager
def _running(model: Model) -> Iterator[tuple[Score, Provenance]]:
    """Yield the function from a probe to its hidden states, and the run's provenance."""
    checkpoint, dtype = model.checkpoint, model.dtype
    if model.engine == "hf":
        device = choose_device()
        provenance = Provenance("reference", device, platform_of(device), dtype)

        def by_hf(probe: Probe) -> NDArray[np.float32]:
            measured = reference.measure(
                checkpoint.directory, probe, dtype=dtype, announce=lambda _: None, device=device
            )
            assert measured.hidden is not None  # only float64 has none
            return measured.hidden

        yield by_hf, provenance
        return
    settings = checkpoint.engine
    with engine.running_engine(checkpoint.directory, settings=settings, dtype=dtype) as llm:

        def by_vllm(probe: Probe) -> NDArray[np.float32]:
            hidden = session.score(llm, probe, hidden=True)[2]
            assert hidden is not None
            return hidden

        yield by_vllm, session.provenance_of(llm, dtype)


def _write_chunk(into: Path, number: int, chunk: Chunk) -> ChunkFile:
    from safetensors.numpy import save

    lines = "\n".join(_window_line(window) for window in chunk.windows)
    arrays = {
        "hidden": np.ascontiguousarray(packed(chunk.hidden)),
        "windows": np.frombuffer(lines.encode(), np.uint8),
    }
    content = save(arrays)
    name = f"{number:05}.safetensors"
    write_atomically(into / name, content)
    return ChunkFile(name, hashlib.sha256(content).hexdigest(), len(chunk.hidden))


def _read_windows(path: Path) -> list[Window]:
    lines = _array(path, "windows").tobytes().decode().splitlines()
    return [
        Window(document, stratum, score_from, tuple(ids), "")
        for document, stratum, score_from, ids in map(json.loads, lines)
    ]


def _array(path: Path, name: str) -> NDArray[Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as stream:
        found: NDArray[Any] = stream.get_tensor(name)
        return found


def _window_line(window: Window) -> str:
    content = [window.document, window.stratum, window.score_from, list(window.ids)]
    return json.dumps(content, separators=(",", ":"))
