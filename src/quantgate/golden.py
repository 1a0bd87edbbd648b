"""Goldens: what a person approved, stored per checkpoint, check and platform.

A golden holds measured values and where they come from, never a threshold: policy and measurement
change for different reasons. Only `tools/regen_golden.py` writes one.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from syrupy.extensions.json import JSONSnapshotExtension

from quantgate.budget import drift_margin
from quantgate.checkpoint import BadInput, Checkpoint, identity, read_config
from quantgate.compare import drift_exact, drift_mean
from quantgate.measurement import Measurement, Provenance
from quantgate.probe import Probe
from quantgate.scheme import quantizes_activations
from quantgate.verdict import Outcome, Verdict, not_run

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion
    from syrupy.location import PyTestLocation
    from syrupy.types import SerializableData, SnapshotIndex

SCHEMA = 1
_RESTORE = "restore it with git, or take it again with tools/regen_golden.py"


@dataclass(frozen=True)
class GoldenKey:
    """What a golden is of. There is no nearest match: another key has no golden."""

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
    """A stored measurement, its key, and who approved it why."""

    key: GoldenKey
    measurement: Measurement
    history: tuple[dict[str, Any], ...]
    """Oldest first: date, reason, versions, mean_nll."""


def golden_key(checkpoint: Checkpoint, probe: Probe, measured: Measurement) -> GoldenKey:
    """Return the key that a measurement of `checkpoint` is stored under."""
    return GoldenKey(
        identity=identity(checkpoint.directory),
        probe=probe.sha256,
        platform=measured.provenance.platform,
        dtype=measured.provenance.dtype,
        kv_dtype=checkpoint.engine.kv_cache_dtype,
        kernels=checkpoint.engine.kernels,
    )


def golden_path(root: Path, checkpoint_id: str, check: str, platform: str) -> Path:
    """Return where a golden lies: `golden/<checkpoint id>/<check>.<platform>.json`."""
    return root / "golden" / checkpoint_id / f"{check}.{platform}.json"


def to_json(golden: Golden, probe: Probe) -> str:
    """Serialize a golden: readable figures, exact scores, one line a document for a reviewer."""
    m = golden.measurement
    documents = {}
    for name in dict.fromkeys(probe.documents.tolist()):
        rows = probe.documents == name
        documents[name] = {
            "logprob": _encode(m.logprob[rows].astype("<f4")),
            "mean_nll": float(-np.mean(m.logprob[rows], dtype=np.float64)),
            "top1": _encode(m.top1[rows].astype("<i4")),
        }
    content = {
        "schema": SCHEMA,
        "key": asdict(golden.key),
        "measured": {
            "documents": documents,
            "mean_nll": m.mean_nll,
            "n": len(m.logprob),
            "nonfinite": m.nonfinite,
            "perplexity": m.perplexity,
        },
        "provenance": asdict(m.provenance),
        "history": list(golden.history),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def from_json(text: str, probe: Probe, path: Path | str) -> Golden:
    """Read a golden of `probe`; `BadInput` where the file is damaged or edited by hand."""
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            raise BadInput(
                f"{path}: schema {content['schema']}, but this quantgate reads {SCHEMA}."
            )
        key = GoldenKey(**content["key"])
        measured, provenance = content["measured"], content["provenance"]
        measurement = Measurement(
            values=_decode_documents(measured["documents"], probe, key, "logprob", "<f4"),
            top1=_decode_documents(measured["documents"], probe, key, "top1", "<i4"),
            provenance=Provenance(
                **{**provenance, "source": "golden", "emulated": tuple(provenance["emulated"])}
            ),
        )
        whole = measurement.mean_nll == measured["mean_nll"] or key.probe != probe.sha256
        history = tuple(content["history"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: damaged ({type(error).__name__}: {error}); {_RESTORE}.") from None
    if not whole:
        raise BadInput(f"{path}: its mean_nll is not that of its scores; {_RESTORE}.")
    return Golden(key, measurement, history)


def _encode(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _decode_documents(
    documents: dict[str, Any], probe: Probe, key: GoldenKey, field: str, dtype: str
) -> np.ndarray[Any, Any]:
    """Return [n] in the probe's order; a golden of another probe is read in its own."""
    arrays = {
        name: np.frombuffer(base64.b64decode(document[field], validate=True), dtype)
        for name, document in documents.items()
    }
    if key.probe != probe.sha256:
        return np.concatenate(list(arrays.values()))
    values = np.empty(probe.scored, dtype)
    for name, array in arrays.items():
        values[probe.documents == name] = array
    return values


def drift(
    snapshot: SnapshotAssertion,
    checkpoint: Checkpoint,
    probe: Probe,
    measured: Measurement,
    *,
    check: str,
    rounding: Callable[[], float],
) -> Verdict:
    """Judge a fresh measurement against the checkpoint's golden for `check`.

    float32 is judged token by token, any other dtype and any format that quantizes activations by
    the mean. Without a golden for this very
    key the verdict is "not-run"; if only the checkpoint's bytes are others than the approved ones,
    the scores are compared all the same, and cannot pass. `rounding` is `drift_exact`'s.
    """
    path = golden_path(checkpoint.root, checkpoint.id, check, measured.provenance.platform)
    chaotic = quantizes_activations(read_config(checkpoint.directory).get("quantization_config"))
    key = golden_key(checkpoint, probe, measured)
    regenerate = (
        f'if intended, python tools/regen_golden.py --checkpoint {checkpoint.id} --reason "…"'
    )

    def judge(stored: Golden) -> Verdict:
        if dataclasses.replace(stored.key, identity=key.identity) != key:
            return not_run(f"{path} is of {_key_difference(stored.key, key)}", regenerate)
        if measured.provenance.dtype == "float32" and not chaotic:
            verdict = drift_exact(measured, stored.measurement, probe, rounding=rounding)
        else:
            margin = drift_margin(checkpoint)
            verdict = drift_mean(measured, stored.measurement, probe, margin=margin)
        if stored.key.identity != key.identity:
            verdict = _of_other_bytes(verdict, stored.key, key)
        return dataclasses.replace(verdict, next_step=regenerate)

    golden = Golden(key, measured, history=())
    verdict = _judge_stored(snapshot, path, golden, probe, judge)
    return verdict or not_run(f"{path} does not exist: nobody approved this yet", regenerate)


def _key_difference(stored: GoldenKey, wanted: GoldenKey) -> str:
    changed = [
        f"{field} {theirs:.12}, not {ours:.12}"
        for (field, theirs), ours in zip(
            asdict(stored).items(), asdict(wanted).values(), strict=True
        )
        if theirs != ours and field != "identity"
    ]
    return "; ".join(changed)


def _of_other_bytes(verdict: Verdict, stored: GoldenKey, wanted: GoldenKey) -> Verdict:
    other = f"the bytes are not the approved ones ({stored.identity:.12} → {wanted.identity:.12})"
    outcome: Outcome = "not-run" if verdict.outcome == "pass" else verdict.outcome
    return dataclasses.replace(verdict, outcome=outcome, detail=f"{verdict.detail}; {other}")


def _judge_stored(
    snapshot: SnapshotAssertion,
    path: Path,
    measured: Golden,
    probe: Probe,
    judge: Callable[[Golden], Verdict],
) -> Verdict | None:
    """Return what `judge` says of the golden at `path`, recalled by syrupy; None without one.

    syrupy's own equality would compare text and know two outcomes; `judge` compares numbers and
    knows four.
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
            raise RuntimeError("goldens are written by tools/regen_golden.py alone")

    assertion = snapshot.use_extension(GoldenExtension)
    _ = assertion == measured
    if (error := assertion.executions[0].exception) is not None:
        raise error
    return verdicts[0] if verdicts else None
