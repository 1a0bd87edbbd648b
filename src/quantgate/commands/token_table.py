"""Label the tokens of texts, with probabilities; used by the scripts in `tools/`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.errors import BadInput
from quantgate.measuring.engine import running_engine
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.session import kernel_fingerprint
from quantgate.patches.pooling_api import token_task_options
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.task import activation_of, label_names


@dataclass(frozen=True)
class LabelledToken:
    """One token of a text."""

    token: str
    id: int
    label: str
    """The label with the largest logit."""
    probability: float
    """The label's probability, under the config's activation."""
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Labelled:
    """A model's labels for some texts."""

    model: str
    dtype: str
    labels: tuple[str, ...]
    emulated: tuple[str, ...]
    """The emulated kernels among those that served it."""
    texts: tuple[tuple[LabelledToken, ...], ...]


def label_texts(
    model: str, task: str, labels: int | None, texts: Sequence[str], dtype: str
) -> Labelled:
    """Serve the texts and label their tokens.

    `task` is "token_classification" or "token_reward". `BadInput` or `EngineFailure` say in one
    sentence what is wrong with the model or a text.
    """
    settings = {} if labels is None else {"num_labels": labels}
    try:
        token_task_options(model, task, settings)
    except ValueError as error:
        raise BadInput(str(error)) from None
    for number, text in enumerate(texts, start=1):
        if not text:
            raise BadInput(f"--text number {number} is empty; there is no token in it to label.")
    with running_engine(
        Path(model),
        settings=EngineSettings(enforce_eager=True),  # compiling takes longer than a few texts
        dtype=dtype,
        task=task,
        model_config=settings,
        skip_tokenizer_init=False,
    ) as llm:
        return _labelled(llm, model, texts)


def _labelled(llm: Any, model: str, texts: Sequence[str]) -> Labelled:
    from vllm.inputs import TokensPrompt

    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    limit = llm.llm_engine.model_config.max_model_len
    for number, ids in enumerate(prompts, start=1):
        if len(ids) > limit:
            raise BadInput(
                f"--text number {number} has {len(ids)} tokens, but the model takes at most "
                f"{limit}; shorten or split it."
            )
    outputs = llm.encode([TokensPrompt(prompt_token_ids=ids) for ids in prompts], use_tqdm=False)
    config = llm.llm_engine.model_config.hf_config.to_dict()
    names = label_names(config) or tuple(f"LABEL_{i}" for i in range(outputs[0].data.shape[1]))
    return Labelled(
        model,
        str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        names,
        kernel_fingerprint(llm)[1],
        tuple(
            tuple(_tokens(tokenizer, ids, output.data.float(), config, names))
            for ids, output in zip(prompts, outputs, strict=True)
        ),
    )


def _tokens(
    tokenizer: Any, ids: Sequence[int], logits: Any, config: dict[str, Any], names: Sequence[str]
) -> list[LabelledToken]:
    kind = activation_of(config, logits.shape[1])
    activations = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}
    best = logits.argmax(-1, keepdim=True)
    probability = activations[kind].gather(1, best)[:, 0].tolist()
    return [
        LabelledToken(tokenizer.decode([token]), token, names[label], chance, tuple(row))
        for token, label, chance, row in zip(
            ids, best[:, 0].tolist(), probability, logits.tolist(), strict=True
        )
    ]


def show(found: Labelled) -> None:
    """Print a table for each text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for tokens in found.texts:
        rows = Table(box=None, pad_edge=False, header_style="bold")
        rows.add_column("token", no_wrap=True)
        rows.add_column("label", no_wrap=True)
        rows.add_column("probability", justify="right")
        for token in tokens:
            # Text, not markup, and without control characters: both come from the checkpoint.
            cells = (repr(token.token)[1:-1], token.label, f"{token.probability:.4f}")
            rows.add_row(*(Text("".join(c if c.isprintable() else "?" for c in x)) for x in cells))
        console.print(rows)
    if found.emulated:
        console.print(Text(f"emulated kernels: {', '.join(found.emulated)}"))


def run(task: str, description: str) -> int:
    """Command-line entry point of a task; returns 2 on a user error."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID")
    parser.add_argument("--num-labels", type=int, metavar="N", help="must be the checkpoint's")
    parser.add_argument("--text", required=True, action="append", help="may be repeated")
    parser.add_argument("--dtype", default="auto", help="default: the checkpoint's own")
    parser.add_argument("--json", action="store_true", help="print JSON, logits included")
    arguments = parser.parse_args()
    try:
        found = label_texts(
            arguments.model, task, arguments.num_labels, arguments.text, arguments.dtype
        )
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), ensure_ascii=False, indent=2))
    else:
        show(found)
    return 0
