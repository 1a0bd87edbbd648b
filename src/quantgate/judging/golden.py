"""Goldens: approved measurements, stored per checkpoint, check and platform.

A golden holds measured values and their provenance, never a threshold: policy and measurement
change for different reasons. Only `quantgate approve` writes one.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from syrupy.extensions.json import JSONSnapshotExtension

from quantgate.errors import BadInput
from quantgate.judging.changed_files import Change, change_since
from quantgate.judging.verdict import Outcome, Verdict, not_run
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.patches.wanted import NATIVE
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import identity
from quantgate.subject.probe import Probe
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion
    from syrupy.location import PyTestLocation
    from syrupy.types import SerializableData, SnapshotIndex

SCHEMA = 2
CHECKSUM = "sha256"
UNCHANGED = "same versions, kernels and arithmetic"
SKETCH = 16
# Files in a checkpoint's folder: `<kind>-<dtype>.<platform>.json`.
KINDS, DTYPES = ("drift", "noise"), ("float32", "serving")
_RESTORE = "restore it with git, or remove it and take a new one with `quantgate approve`"


@dataclass(frozen=True)
class GoldenKey:
    """Identifies what a golden measures. Keys match exactly or not at all."""

    identity: str
    """sha256 of the checkpoint's bytes."""
    probe: str
    """sha256 of the probe."""
    platform: str
    dtype: str
    kv_dtype: str
    kernels: str
    """"portable" or "native"."""


@dataclass(frozen=True)
class Golden:
    """A stored measurement, its key and its approvals."""

    key: GoldenKey
    measurement: Measurement
    history: tuple[dict[str, Any], ...]
    """Oldest first: date, reason, versions, mean_nll."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The sha256 of each of the checkpoint's files, by name; {} in older goldens."""


def golden_key(checkpoint: Checkpoint, probe: Probe, measured: Measurement) -> GoldenKey:
    """Return the key that a measurement of `checkpoint` is stored under."""
    return GoldenKey(
        identity=identity(checkpoint.directory),
        probe=probe.sha256,
        platform=measured.provenance.platform,
        dtype=measured.provenance.dtype,
        kv_dtype=checkpoint.engine.kv_cache_dtype,
        kernels=checkpoint.engine.kernels if measured.provenance.device == "cpu" else NATIVE,
    )


def unclaimed(root: Path, checkpoints: Mapping[str, Checkpoint]) -> list[Path]:
    """Return paths in `golden` that belong to no checkpoint file, or are not named like goldens."""
    names = {f"{kind}-{dtype}" for kind in KINDS for dtype in DTYPES}
    found = []
    for path in sorted((root / "golden").glob("[!.]*")):
        checkpoint = checkpoints.get(path.name)
        if checkpoint is None or not checkpoint.golden:
            found.append(path)
            continue
        for file in sorted(path.glob("*")):
            kind = file.name.split(".")[0]
            # A file that begins with a dot is left from an interrupted write.
            if not file.name.startswith(".") and (kind not in names or file.suffix != ".json"):
                found.append(file)
    return found


def stored_dtype(dtype: str) -> str:
    """Return a dtype's name in file names: "float32", or "serving" for the serving dtype."""
    return "float32" if dtype == "float32" else "serving"


def golden_path(root: Path, checkpoint_id: str, check: str, platform: str) -> Path:
    """Return a golden's path: `golden/<checkpoint id>/<check>.<platform>.json`."""
    return root / "golden" / checkpoint_id / f"{check}.{platform}.json"


def to_json(golden: Golden, probe: Probe) -> str:
    """Serialize a golden: readable figures, exact scores, one line per document for reviewers."""
    m = golden.measurement
    documents = {}
    for name in dict.fromkeys(probe.documents.tolist()):
        rows = probe.documents == name
        documents[name] = {
            **_stored_values(m.values[rows].astype("<f4")),
            "top1": _encode(m.top1[rows].astype("<i4")),
        }
    content = {
        "schema": SCHEMA,
        "key": asdict(golden.key),
        "measured": {
            "documents": documents,
            "n": len(m.values),
            "nonfinite": m.nonfinite,
            **figures_of(m, probe),
        },
        "provenance": asdict(m.provenance),
        "history": list(golden.history),
        **({"files": dict(golden.files)} if golden.files else {}),
    }
    content[CHECKSUM] = _checksum(content)
    return json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a golden's content, excluding its own sha256.

    It covers the stored text, not recomputed figures: means and perplexities of the same values
    differ in their last bit from processor to processor.
    """
    others = {name: value for name, value in content.items() if name != CHECKSUM}
    text = json.dumps(others, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _stored_values(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    if values.ndim == 1:
        return {
            "logprob": _encode(values),
            "mean_nll": float(-np.mean(values, dtype=np.float64)),
        }
    return {"mean": float(np.mean(values, dtype=np.float64)), "values": _encode(values)}


def figures_of(measured: Measurement, probe: Probe) -> dict[str, float]:
    """Return the figures that summarize a golden's values."""
    if probe.task == GENERATE:
        return {"mean_nll": measured.mean_nll, "perplexity": measured.perplexity}
    values = measured.values.astype(np.float64)
    return {"mean": float(values.mean()), "rms": float(np.sqrt(np.mean(values**2)))}


def from_json(text: str, probe: Probe, path: Path | str) -> Golden:
    """Read a golden of `probe`; raise `BadInput` if the file is damaged or edited by hand."""
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            raise BadInput(
                f"{path}: schema {content['schema']}, but this quantgate reads {SCHEMA}."
            )
        if content[CHECKSUM] != _checksum(content):
            raise BadInput(f"{path}: its sha256 is not that of what it holds; {_RESTORE}.")
        key = GoldenKey(**content["key"])
        measured, provenance = content["measured"], content["provenance"]
        field = "logprob" if probe.task == GENERATE else "values"
        documents = measured["documents"]
        measurement = Measurement(
            values=_decode_documents(documents, probe, key, field, "<f4", measured["n"]),
            top1=_decode_documents(documents, probe, key, "top1", "<i4", measured["n"]),
            provenance=Provenance(
                **{
                    **provenance,
                    "source": "golden",
                    "emulated": tuple(provenance["emulated"]),
                    "repaired": tuple(provenance.get("repaired", ())),
                }
            ),
        )
        history = tuple(content["history"])
        files = dict(content.get("files", {}))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: damaged ({type(error).__name__}: {error}); {_RESTORE}.") from None
    return Golden(key, measurement, history, files)


def _encode(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _decode_documents(
    documents: dict[str, Any], probe: Probe, key: GoldenKey, field: str, dtype: str, n: int
) -> np.ndarray[Any, Any]:
    """Return [n] or [n, D] in the probe's order, or in the golden's own if the probes differ."""
    arrays = {
        name: np.frombuffer(base64.b64decode(document[field], validate=True), dtype)
        for name, document in documents.items()
    }
    if field == "values":
        width = sum(map(len, arrays.values())) // n
        arrays = {name: array.reshape(-1, width) for name, array in arrays.items()}
    if key.probe != probe.sha256:
        return np.concatenate(list(arrays.values()))
    values = np.empty((probe.scored, *next(iter(arrays.values())).shape[1:]), dtype)
    for name, array in arrays.items():
        values[probe.documents == name] = array
    return values


def since_golden(checkpoint: Checkpoint, measured: Provenance) -> str | None:
    """Describe how a measurement's versions and kernels differ from the golden's.

    None if the checkpoint has no golden that records them.
    """
    name = f"drift-{stored_dtype(measured.dtype)}"
    path = golden_path(checkpoint.root, checkpoint.id, name, measured.platform)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        then, taken = content["provenance"], content["history"][-1]["date"]
        before = {**then["versions"], **then["kernels"], **then["arithmetic"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None  # reading the golden itself reports what is wrong with it
    now = {**measured.versions, **measured.kernels, **measured.arithmetic}
    changed = [
        f"{name} {before.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return f"{', '.join(changed) or UNCHANGED} (golden of {taken})"


def history_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the approvals (who, when, why) of a checkpoint's serving golden, oldest first.

    From any platform that has one; [] if none can be read.
    """
    for path in sorted((checkpoint.root / "golden" / checkpoint.id).glob("drift-serving.*.json")):
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))["history"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []


def judge_golden(
    snapshot: SnapshotAssertion,
    checkpoint: Checkpoint,
    probe: Probe,
    measured: Measurement,
    *,
    check: str,
    compare: Callable[[Measurement, Measurement], Verdict],
) -> Verdict:
    """Return `compare`'s verdict on a fresh measurement and the checkpoint's golden for `check`.

    Without a golden for exactly this key the verdict is "not-run"; if only the checkpoint's bytes
    differ from the approved ones, the values are still compared, but cannot pass. What has changed
    in its files decides whether approval is the next step.
    """
    path = golden_path(checkpoint.root, checkpoint.id, check, measured.provenance.platform)
    key = golden_key(checkpoint, probe, measured)
    regenerate = f'if intended, quantgate approve --checkpoint {checkpoint.id} --reason "…"'
    kept = as_stored(measured)

    def judge(stored: Golden) -> Verdict:
        if dataclasses.replace(stored.key, identity=key.identity) != key:
            verdict = not_run(f"{path} is of {_key_difference(stored.key, key)}")
        else:
            verdict = compare(kept, stored.measurement)
        if stored.key.identity == key.identity:
            return dataclasses.replace(verdict, next_step=regenerate)
        # Another tokenizer makes another probe of the same texts: a fault, until it is explained.
        approve = regenerate if stored.key.probe == key.probe else ""
        change = change_since(checkpoint, stored.files, approve)
        return _of_other_bytes(verdict, stored.key, key, change)

    golden = Golden(key, kept, history=())
    verdict = _judge_stored(snapshot, path, golden, probe, judge)
    return verdict or not_run(f"{path} does not exist: it has no approved golden yet", regenerate)


def as_stored(measured: Measurement) -> Measurement:
    """Return the part of a measurement that a golden stores: for wide embeddings, a sketch.

    A sketch holds projections onto `SKETCH` fixed random directions: a change in an embedding
    changes them by its rms (Johnson and Lindenstrauss, 1984).
    """
    values = measured.values
    if values.ndim == 1 or values.shape[1] <= SKETCH:
        return measured
    # NumPy guarantees this generator's stream across versions.
    signs = np.random.RandomState(0).choice((-1.0, 1.0), (values.shape[1], SKETCH))
    sketch = values.astype(np.float64) @ signs / np.sqrt(values.shape[1])
    return dataclasses.replace(measured, values=sketch.astype(np.float32), activated=None)


def _key_difference(stored: GoldenKey, wanted: GoldenKey) -> str:
    changed = [
        f"{field} {theirs:.12}, not {ours:.12}"
        for (field, theirs), ours in zip(
            asdict(stored).items(), asdict(wanted).values(), strict=True
        )
        if theirs != ours and field != "identity"
    ]
    return "; ".join(changed)


def _of_other_bytes(
    verdict: Verdict, stored: GoldenKey, wanted: GoldenKey, change: Change
) -> Verdict:
    other = f"the bytes are not the approved ones ({stored.identity:.12} → {wanted.identity:.12})"
    outcome: Outcome = "not-run" if verdict.outcome == "pass" else verdict.outcome
    detail = "; ".join(filter(None, (verdict.detail, other, change.detail)))
    return dataclasses.replace(verdict, outcome=outcome, detail=detail, next_step=change.next_step)


def _judge_stored(
    snapshot: SnapshotAssertion,
    path: Path,
    measured: Golden,
    probe: Probe,
    judge: Callable[[Golden], Verdict],
) -> Verdict | None:
    """Return `judge`'s verdict on the golden at `path`, read through syrupy; None without one.

    syrupy's own equality would compare text, with two outcomes; `judge` compares numbers, with
    four.
    """
    verdicts: list[Verdict] = []

    class GoldenExtension(JSONSnapshotExtension):
        """`golden/<checkpoint id>/<check>.<platform>.json`, read and never written."""

        @classmethod
        def dirname(cls, *, test_location: PyTestLocation) -> str:
            return str(path.parent)

        @classmethod
        def get_snapshot_name(
            cls, *, test_location: PyTestLocation, index: SnapshotIndex = 0
        ) -> str:
            return path.stem  # syrupy requires it to be the file's stem

        def serialize(self, data: SerializableData, **_: Any) -> str:
            return to_json(data, probe)

        def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
            verdicts.append(judge(from_json(snapshot_data, probe, path)))
            return verdicts[0].outcome == "pass"

        @classmethod
        def write_snapshot_collection(cls, **_: Any) -> None:
            raise RuntimeError("goldens are written by `quantgate approve` alone")

    assertion = snapshot.use_extension(GoldenExtension)
    _ = assertion == measured
    if (error := assertion.executions[0].exception) is not None:
        raise error
    return verdicts[0] if verdicts else None
