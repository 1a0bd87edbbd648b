"""Perplexity by published protocols: which tokens are scored, and from how much context."""

import itertools
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preloaded import run_python

from quantgate.commands import perplexity
from quantgate.commands.perplexity import ScoredWindow, Tally, result_of
from quantgate.errors import BadInput
from quantgate.measuring.engine import running_engine
from quantgate.subject.checkpoint import EngineSettings

BOS = -1  # no id of a text
TEXTS = st.integers(0, 300).map(lambda n: list(range(n)))


def scored(windows: list[ScoredWindow]) -> list[int]:
    return [token for window in windows for token in window.ids[window.score_from :]]


def is_contiguous(window: ScoredWindow) -> bool:
    ids = [token for token in window.ids if token != BOS]
    return all(b == a + 1 for a, b in itertools.pairwise(ids))


@given(ids=TEXTS, context=st.integers(2, 40), stride=st.integers(1, 39))
def test_sliding_is_hugging_faces_loop(ids: list[int], context: int, stride: int) -> None:
    """As "Perplexity of fixed-length models" of the transformers documentation describes it."""
    stride = min(stride, context - 1)
    expected, reached = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        new = end - reached
        expected.append((ids[begin:end], max(1, end - begin - new)))
        reached = end
        if end == len(ids):
            break
    windows = list(perplexity.sliding(context, stride).windows(iter(ids), None))
    assert [(w.ids, w.score_from) for w in windows] == [e for e in expected if e[1] < len(e[0])]
    assert scored(windows) == ids[1:]


@given(ids=TEXTS, context=st.integers(2, 40))
def test_rolling_scores_every_token_once_as_lm_eval_does(ids: list[int], context: int) -> None:
    windows = list(perplexity.rolling(context).windows(iter(ids), BOS))
    assert scored(windows) == ids
    assert all(is_contiguous(window) and len(window.ids) <= context for window in windows)
    # Full windows score all but their first token; the last is filled up with context.
    assert all(window.score_from == 1 for window in windows[:-1])
    assert all(len(window.ids) == context for window in windows[1:])
    assert [window.ids[0] for window in windows[:1]] == [BOS] * (len(ids) > 0)


@given(ids=TEXTS, context=st.integers(2, 40), bos=st.sampled_from([None, BOS]))
def test_llama_cpp_scores_the_second_half_of_disjoint_chunks(
    ids: list[int], context: int, bos: int | None
) -> None:
    windows = list(perplexity.llama_cpp(context).windows(iter(ids), bos))
    assert len(windows) == len(ids) // context
    for number, window in enumerate(windows):
        chunk = ids[number * context : (number + 1) * context]
        assert window.ids == (chunk if bos is None else [bos, *chunk[1:]])
        assert window.score_from == context // 2 + 1


@given(ids=TEXTS, context=st.integers(2, 40), rows=st.sampled_from([None, 1, 3]))
def test_exl3_scores_rows_that_more_text_follows(
    ids: list[int], context: int, rows: int | None
) -> None:
    windows = list(perplexity.exl3(context, rows).windows(iter(ids), None))
    starts = list(range(0, len(ids) - context, context))[:rows]
    assert [window.ids for window in windows] == [ids[a : a + context] for a in starts]
    assert {window.score_from for window in windows} <= {1}


def test_a_text_is_never_held_as_a_whole() -> None:
    """Windows of an endless text come at once, by every protocol."""
    for make in perplexity.PROTOCOLS.values():
        windows = make(8).windows(itertools.count(), BOS)
        assert len(list(itertools.islice(windows, 50))) == 50
    taken = itertools.count()
    windows = (ScoredWindow([next(taken)] * 1000, 1) for _ in itertools.count())
    batch = next(perplexity.batches(windows))
    assert len(batch) == math.ceil(perplexity.BATCH_TOKENS / 1000)
    assert next(taken) == len(batch)


def test_the_result_is_the_mean_and_its_error() -> None:
    nll = np.random.default_rng(0).gamma(2.0, size=(40, 25))
    tally = Tally(bytes=4000, words=700)
    for row in nll:
        tally.add(row)
    found = result_of(tally, perplexity.rolling())
    ppl = np.exp(nll.mean())
    assert found.perplexity == pytest.approx(ppl)
    assert (found.tokens, found.windows) == (1000, 40)
    means = nll.mean(axis=1)  # windows of one length: the clustered error is that of their means
    assert found.standard_error == pytest.approx(ppl * means.std(ddof=1) / math.sqrt(40))
    assert found.standard_error_iid == pytest.approx(ppl * nll.std(ddof=1) / math.sqrt(1000))
    assert found.bits_per_byte == pytest.approx(nll.sum() / 4000 / math.log(2))
    assert found.word_perplexity == pytest.approx(math.exp(nll.sum() / 700))


def test_what_is_no_number_is_no_perplexity() -> None:
    tally = Tally()
    with pytest.raises(BadInput, match=r"no token to score by protocol exl3 .* --protocol sliding"):
        result_of(tally, perplexity.exl3())
    tally.add(np.array([1.0, np.nan, np.inf]))
    with pytest.raises(BadInput, match="2 of 3 scored tokens have a log-probability that is not"):
        result_of(tally, perplexity.exl3())


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


def run_tool(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        "tools/perplexity.py", *arguments, cwd=root, env={"HF_HUB_OFFLINE": "1", **os.environ}
    )


def test_the_tool_says_what_it_scored(root: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text)
    result = run_tool(
        root,
        *("--model", "build/tiny-llama-w4a16", "--text-file", str(tmp_path / "text.txt")),
        *("--protocol", "llama.cpp", "--context-length", "128", "--quantization"),
        *("compressed-tensors", "--enforce-eager", "--json", str(tmp_path / "out.json")),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert result.stdout.splitlines()[0] == (
        "protocol llama.cpp: chunks of 128 tokens, the first replaced by BOS, "
        "tokens 65 … 127 of each scored"
    )
    assert (
        f"perplexity {report['perplexity']:.4f} ± {report['standard_error']:.4f}" in result.stdout
    )
    assert f"scored {report['tokens']:,} tokens" in result.stdout
    assert report["tokens"] == 63 * report["windows"]
    assert "tokens/s" in result.stdout
    assert ("emulated kernels: " in result.stdout) == bool(report["emulated"])
    assert "tokens scored" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "wikitext", "--dataset-config", "wikitext-2-raw-v1"],
            "data set wikitext/wikitext-2-raw-v1, split test: not in the cache",
        ),
        (["--text", "a b", "--stride", "4", "--protocol", "exl3"], "--stride is for --protocol"),
        (["--text", "a b", "--stride", "2048"], "--stride must be in 1 … 2047"),
        (["--text", "a b", "--context-length", "1"], "--context-length must be at least 2, got 1"),
        (["--text-file", "nowhere.txt"], "--text-file nowhere.txt: no such file"),
        (["--text", "a", "--model", "no/where"], "--model no/where: no tokenizer to be had"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    root: Path, arguments: list[str], message: str
) -> None:
    result = run_tool(root, "--model", "build/tiny-llama-w4a16", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
