"""What the gate checks: one object per check, in reading order.

Is it computed correctly, what did quantization cost, what changed, does it depend on how it is
served? Selection, names, next steps, reports and the documented table are derived from `CHECKS`; a
suite has one line for each check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from quantgate.errors import BadInput
from quantgate.judging import audited, fidelity, invariance, pooled
from quantgate.judging.drift import drift
from quantgate.judging.quality import divergence_from_base, quality
from quantgate.subject.task import EMBED, GENERATE, SEQUENCE_REWARD, Task
from quantgate.subject.tier import Tier

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion

    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.case import Case
    from quantgate.subject.checkpoint import Checkpoint

Precision = Literal["float32", "serving"]
BOTH: tuple[Precision, ...] = ("float32", "serving")
# What a checkpoint or its probe may lack. "tensor-parallel" and "compiled" are requested in its
# file, or by the full tier.
Need = Literal[
    "base", "golden", "step_tag", "metric", "long contexts", "tensor-parallel", "compiled"
]
# What to do when a check does not pass; `next_step` has the text.
Remedy = Literal["find the module", "change the settings", "weigh the cost", "export again", ""]

LABELS: tuple[Task, ...] = ("token_classify", "token_reward", SEQUENCE_REWARD)
POOLS: tuple[Task, ...] = (*LABELS, EMBED)
ALL: tuple[Task, ...] = (GENERATE, *POOLS)


class Asked(NamedTuple):
    """What a check is given to judge."""

    case: Case
    """In the check's dtype if it has precisions; otherwise in the serving dtype, and the check
    chooses for itself."""
    snapshot: Callable[[], SnapshotAssertion]
    """Gives the golden of the calling test."""
    name: str
    """The check's name, with its precision."""


@dataclass(frozen=True)
class Check:
    """One question about a checkpoint."""

    family: str
    """Its name without a precision, e.g. "replay"; `test_<family>` in the suites runs it."""
    question: str
    judge: Callable[[Asked], Verdict]
    remedy: Remedy
    tasks: tuple[Task, ...] = ALL
    needs: tuple[Need, ...] = ()
    precisions: tuple[Precision, ...] = ()
    """The precisions to run it in; none if it chooses for itself."""
    tier: Tier = "standard"
    """The lowest tier that asks it. The quick one asks it in the serving dtype only."""
    moved_by_noise: bool = True
    """Whether noise could reverse its result, so that the noise floor must be measured."""

    @property
    def names(self) -> list[str]:
        """Its names in verdicts, known failures and goldens, e.g. "replay-float32"."""
        return [f"{self.family}-{dtype}" for dtype in self.precisions] or [self.family]


CHECKS = (
    Check(
        "audit",
        "is anything wrong with its files, by themselves and beside the base's?",
        lambda a: audited.files(a.case.checkpoint),
        "",  # its verdict names the command
        tier="quick",
        moved_by_noise=False,
    ),
    Check(
        "audit-weights",
        "is every weight what quantizing the base's gives?",
        lambda a: audited.weights(a.case.checkpoint),
        "",
        needs=("base",),
        tier="quick",
        moved_by_noise=False,
    ),
    Check(
        "audit-loaded",
        "is every parameter that vLLM has loaded what the file holds?",
        lambda a: audited.loaded(a.case),
        "",
        moved_by_noise=False,
        tier="quick",
    ),
    Check(
        "fidelity",
        "do vLLM and HF compute the same function of the same weights?",
        lambda a: fidelity.free_running(a.case),
        "find the module",
        precisions=BOTH,
        tier="quick",
    ),
    Check(
        "replay",
        "on the engine's own inputs, does every linear give what its weights say?",
        lambda a: fidelity.replay(a.case),
        "change the settings",
        precisions=BOTH,
        tier="quick",
        moved_by_noise=False,
    ),
    Check(
        "activation",
        "are outputs what the config makes of raw ones: softmax, sigmoid, unit length?",
        lambda a: pooled.activation(a.case),
        "export again",
        tasks=POOLS,
        tier="quick",
    ),
    Check(
        "head",
        "are the head and its labels the base's, and not quantized?",
        lambda a: pooled.head(a.case),
        "export again",
        tasks=LABELS,
        needs=("base",),
        tier="quick",
    ),
    Check(
        "steps",
        "does STEP pooling give the rewards of the step tags, and of no other token?",
        lambda a: pooled.step_rows(a.case),
        "export again",
        tasks=("token_reward",),
        needs=("step_tag",),
        tier="quick",
    ),
    Check(
        "late-interaction",
        "is `LLM.score` of two texts the max-sim of their token embeddings?",
        lambda a: pooled.late_interaction(a.case),
        "export again",
        tasks=(EMBED,),
        tier="quick",
    ),
    Check(
        "divergence-from-reference",
        "are whole distributions the reference's, but for rounding?",
        lambda a: fidelity.divergence(a.case),
        "find the module",
        tasks=(GENERATE,),
    ),
    Check(
        "long-context",
        "in contexts of thousands of tokens, do vLLM and HF still compute the same function?",
        lambda a: fidelity.long_contexts(a.case),
        "find the module",
        tasks=(GENERATE,),
        needs=("long contexts",),
        tier="full",
    ),
    Check(
        "divergence-from-base",
        "does quantization move distributions by no more than its scheme's budget?",
        lambda a: divergence_from_base(a.case),
        "weigh the cost",
        tasks=(GENERATE,),
        needs=("base",),
    ),
    Check(
        "quality",
        "does quantization cost no more perplexity, or of the task's metric, than its budget?",
        lambda a: quality(a.case),
        "weigh the cost",
        needs=("base", "metric"),
        tier="quick",
    ),
    Check(
        "drift",
        "is what is served what a person approved?",
        lambda a: drift(a.case, a.snapshot(), a.name),
        "",  # its verdict names the tool that approves
        needs=("golden",),
        precisions=BOTH,
    ),
    Check(
        "invariance",
        "does a request get the same in any batch, order, chunks, and from the cache?",
        lambda a: invariance.served_otherwise(a.case),
        "change the settings",
        precisions=BOTH,
    ),
    Check(
        "tensor-parallel",
        "do two ranks give what one gives?",
        lambda a: invariance.tensor_parallel(a.case),
        "change the settings",
        needs=("tensor-parallel",),
        precisions=BOTH,
    ),
    Check(
        "compiled",
        "does a compiled engine give what an eager one gives?",
        lambda a: invariance.compiled(a.case),
        "change the settings",
        needs=("compiled",),
        precisions=BOTH,
    ),
)
_BY_NAME = {name: check for check in CHECKS for name in check.names}


def named(name: str) -> Check | None:
    """Return the check with a name such as "replay-float32"; None for a project's own check."""
    return _BY_NAME.get(name)


def of_test(function: str) -> Check | None:
    """Return the check that a suite's test runs, e.g. `test_late_interaction`."""
    family = function.removeprefix("test_").replace("_", "-")
    return next((check for check in CHECKS if check.family == family), None)


def place_of(name: str) -> int:
    """Return a check's position in a checkpoint's list; a project's own checks come last."""
    check = named(name)
    return len(CHECKS) if check is None else CHECKS.index(check)


def require_known(checkpoint: Checkpoint) -> None:
    """Raise `BadInput` if a checkpoint's file names a check that does not exist."""
    given = {known.check: "[[known_failure]] check" for known in checkpoint.known_failure}
    given |= dict.fromkeys(checkpoint.not_quick, "not_quick")
    for name, key in given.items():
        if name not in _BY_NAME:
            raise BadInput(
                f"{checkpoint.id}: {key} '{name}' is not a check; there are {', '.join(_BY_NAME)}."
            )
