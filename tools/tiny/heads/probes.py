"""What the models with heads are probed with: held-out examples."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tiny.heads.examples import (
    IGNORED,
    NER_LABELS,
    STEP_LABELS,
    Example,
    entity_examples,
    graded_examples,
    retrieval_examples,
    step_examples,
)

# Tokens of a probe's window at most: what is approved of each is kept in a golden.
PROBE_LENGTH = 128
QUALITY = "-quality"


@dataclass(frozen=True)
class ProbeOf:
    """What a task is probed with: held-out examples, how many, and how many for its quality."""

    task: str
    examples: Callable[[Any, str, int], Iterator[Example]]
    count: int
    for_quality: int = 256
    labels: Sequence[str] = ()


PROBES = {
    "entities": ProbeOf("token_classify", entity_examples, 32, labels=NER_LABELS),
    "steps": ProbeOf("token_reward", step_examples, 40, labels=STEP_LABELS),
    "graded": ProbeOf("sequence_reward", graded_examples, 80),
    "retrieval": ProbeOf("token_embed", retrieval_examples, 32),
}


def probe_lines(name: str, tokenizer: Any) -> Iterator[str]:
    """The probe file: a header, then one JSON object per window, as `probe` reads it."""
    made = PROBES[name.removesuffix(QUALITY)]
    header = {
        "probe": name,
        "task": made.task,
        "vocab_size": len(tokenizer),
        "labels": made.labels,
        "description": (made.examples.__doc__ or "").splitlines()[0],
    }
    yield json.dumps(header, ensure_ascii=False, separators=(",", ":")) + "\n"
    count = made.for_quality if name.endswith(QUALITY) else made.count
    for index, example in enumerate(made.examples(tokenizer, "heldout", count)):
        ids = example.ids[:PROBE_LENGTH]
        labels = [None if label == IGNORED else label for label in example.labels[:PROBE_LENGTH]]
        window: dict[str, Any] = {
            "document": f"{name}-{index:03d}",
            "stratum": name,
            "score_from": 0,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "ids": ids,
            "labels": labels,
        }
        if made.task == "sequence_reward":
            window |= {"score_from": len(ids) - 1, "labels": labels[-1:]}
        elif made.task == "token_embed":  # a question, and the text that answers it
            window |= {
                "document": f"{name}-{index // 2:03d}",
                "stratum": ("query", "document")[index % 2],
            }
            del window["labels"]
        yield json.dumps(window, ensure_ascii=False, separators=(",", ":")) + "\n"
