"""A golden of an engine that fails fidelity is refused, or its failure recorded."""

from pathlib import Path
from typing import Any

import pytest

from quantgate.judging import approval
from quantgate.judging.approval import Proposal
from quantgate.measuring.sources import Sources
from quantgate.patches.scoremode import logprob
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe


def test_what_fails_fidelity_is_refused_or_recorded(
    project: Path, small_probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = logprob.score_rows

    def shifted(head: Any, hidden: Any, targets: Any) -> Any:
        found = honest(head, hidden, targets)
        return found._replace(logprob=found.logprob - 1e-3)

    monkeypatch.setattr(logprob, "score_rows", shifted)
    sources = Sources(lambda _task, _quality: small_probe, lambda _: None)
    known = read_checkpoint_files(project)["tiny-llama-w4a16"]

    def propose(*, accept: bool) -> Proposal:
        return approval.propose(sources, known, "float32", "r", accept_failing=accept)

    refused = propose(accept=False)
    assert refused.refusals[0].startswith("fidelity-float32 is fail (")
    assert approval.write(sources, known, "float32", refused) == []
    accepted = propose(accept=True)
    assert accepted.refusals == ()
    assert not accepted.within_tolerance
    assert "fidelity-float32 fail" in accepted.new.history[-1]["accepted_failing"]
