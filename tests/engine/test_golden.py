"""A golden of an engine that fails fidelity is refused, or its failure recorded."""

from pathlib import Path
from typing import Any

import pytest

from quantgate.judging import approval
from quantgate.judging.approval import Proposal
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
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
    lab = Lab(lambda *_: small_probe, Ledger(lambda _: None))
    case = Case.of(read_checkpoint_files(project)["tiny-llama-w4a16"], "float32", lab)

    def propose(*, accept: bool) -> Proposal:
        return approval.propose(case, "r", accept_failing=accept)

    refused = propose(accept=False)
    assert refused.refusals[0].startswith("fidelity-float32 is fail (")
    assert approval.write(case, refused) == []
    accepted = propose(accept=True)
    assert accepted.refusals == ()
    assert not accepted.within_tolerance
    assert "fidelity-float32 fail" in accepted.new.history[-1]["accepted_failing"]
