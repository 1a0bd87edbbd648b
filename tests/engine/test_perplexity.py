"""The protocols' perplexities are those of transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.commands import perplexity
from quantgate.commands.perplexity import Tally, result_of
from quantgate.measuring.engine import running_engine
from quantgate.subject.checkpoint import EngineSettings


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    """The embedded probe's documents, one after another."""
    lines = (root / "fixtures" / "probes" / "tiny.jsonl").read_text().splitlines()
    return "\n\n".join(json.loads(line).get("text", "") for line in lines)[:12000]


@pytest.fixture(scope="module")
def llm(root: Path) -> Iterator[Any]:
    settings = EngineSettings(enforce_eager=True, max_model_len=256)
    with running_engine(root / "fixtures/tiny/llama", settings=settings, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "fixtures/tiny/llama")


@pytest.mark.parametrize("name", perplexity.PROTOCOLS)
def test_the_number_is_transformers_own(
    name: str, llm: Any, tokenizer: Any, text: str, root: Path
) -> None:
    """The same windows through HF, in float32; the text comes in pieces, as a long one would."""
    import torch
    from transformers import AutoModelForCausalLM

    protocol = perplexity.PROTOCOLS[name](256)
    cut = text.index("\n", 5000) + 1
    texts = [text[:cut], text[cut:]]
    tally = perplexity.evaluate(llm, texts, protocol, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(root / "fixtures/tiny/llama", dtype=torch.float32)
    nlls = []
    with torch.inference_mode():
        for window in perplexity.all_windows(texts, protocol, tokenizer, Tally()):
            ids = torch.tensor([window.ids])
            logits = model(ids).logits[0, window.score_from - 1 : -1]
            nlls.append(torch.nn.functional.cross_entropy(logits, ids[0, window.score_from :]))
    weights = np.array(tally.counts)
    expected = float(np.average([float(nll) for nll in nlls], weights=weights))
    assert result_of(tally, protocol).nll == pytest.approx(expected, abs=1e-5)
    assert tally.tokens > 1000


def test_special_tokens_come_once_and_where_the_protocol_has_them(tokenizer: Any) -> None:
    assert perplexity.adds_bos(tokenizer)
    for name, begins in (("sliding", True), ("llama.cpp", True), ("exl3", False)):
        protocol = perplexity.PROTOCOLS[name](16)
        pieces = list(perplexity.tokenized(["one two\n", "three four\n"], protocol, tokenizer))
        has_bos = [piece[0] == tokenizer.bos_token_id for piece in pieces]
        assert has_bos == [begins, False]
