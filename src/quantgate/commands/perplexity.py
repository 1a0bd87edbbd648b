"""Perplexity of a text under the protocols of published numbers, in bounded memory.

A protocol cuts a stream of token ids into windows and decides which tokens of each are scored.
Numbers from different protocols are not comparable: more context makes a token more probable.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.errors import BadInput
from quantgate.judging.stats import clustered_mean

if TYPE_CHECKING:
    from vllm import LLM

# Tokens passed to the engine at a time: enough to fill its batches, few enough to hold in memory.
BATCH_TOKENS = 65536


@dataclass(frozen=True)
class ScoredWindow:
    """One prompt: tokens `score_from` … end are scored, each given all tokens before it."""

    ids: list[int]
    score_from: int


@dataclass(frozen=True)
class Protocol:
    """How a text is tokenized, cut and scored.

    `context` is the largest number of tokens in a prompt. `special_tokens`: the tokenizer adds its
    own at the start. `per_document`: each document is cut separately; otherwise all are joined with
    blank lines. `windows` cuts the ids of one text; its second argument is the BOS token.
    """

    name: str
    context: int
    special_tokens: bool
    per_document: bool
    description: str
    windows: Callable[[Iterable[int], int | None], Iterator[ScoredWindow]]


def exl3(context: int = 2048, rows: int | None = 100) -> Protocol:
    """exllamav3's `eval/ppl.py`: disjoint rows, all but the first token of each scored.

    A row is used only if more text follows it; the default is the first 100 rows.
    """

    def windows(ids: Iterable[int], _: int | None) -> Iterator[ScoredWindow]:
        stream = iter(ids)
        row = list(itertools.islice(stream, context))
        taken = 0
        while len(row) == context and (rows is None or taken < rows):
            following = list(itertools.islice(stream, context))
            if not following:
                return
            yield ScoredWindow(row, 1)
            row, taken = following, taken + 1

    limit = "all rows" if rows is None else f"the first {rows} rows"
    return Protocol(
        "exl3",
        context,
        special_tokens=False,
        per_document=False,
        description=f"{limit} of {context} tokens, all but the first token of each scored",
        windows=windows,
    )


def llama_cpp(context: int = 512) -> Protocol:
    """llama.cpp's `perplexity`: disjoint chunks, the first token BOS, the second half scored.

    Tokens context / 2 + 1 … context - 1 are scored; an incomplete last chunk is dropped.
    """
    first = context // 2 + 1

    def windows(ids: Iterable[int], bos: int | None) -> Iterator[ScoredWindow]:
        stream = iter(ids)
        while len(chunk := list(itertools.islice(stream, context))) == context:
            yield ScoredWindow(chunk if bos is None else [bos, *chunk[1:]], first)

    return Protocol(
        "llama.cpp",
        context,
        special_tokens=True,
        per_document=False,
        description=f"chunks of {context} tokens, the first replaced by BOS, tokens {first} … "
        f"{context - 1} of each scored",
        windows=windows,
    )


def sliding(context: int = 2048, stride: int | None = None) -> Protocol:
    """Hugging Face's "Perplexity of fixed-length models": every token but the first, once.

    Windows of `context` tokens begin every `stride` tokens. Each scores the tokens that the one
    before did not reach, so a token has at least context - stride tokens before it, except near the
    start. The default stride is a quarter of the context.
    """
    step = max(1, context // 4) if stride is None else stride
    if not 1 <= step < context:
        raise BadInput(
            f"--stride must be in 1 … {context - 1} for --context-length {context}, got {step}."
        )

    def windows(ids: Iterable[int], _: int | None) -> Iterator[ScoredWindow]:
        stream = iter(ids)
        window: deque[int] = deque(itertools.islice(stream, context), maxlen=context)
        if len(window) > 1:
            yield ScoredWindow(list(window), 1)
        while new := list(itertools.islice(stream, step)):
            for _ in range(step):  # also at the end of the text, where the window is shorter
                window.popleft()
            window.extend(new)
            yield ScoredWindow(list(window), len(window) - len(new))

    return Protocol(
        "sliding",
        context,
        special_tokens=True,
        per_document=False,
        description=f"windows of {context} tokens every {step}, each token except the first scored "
        f"once, with at least {context - step} tokens of context except near the start",
        windows=windows,
    )


def rolling(context: int = 2048) -> Protocol:
    """lm-evaluation-harness' `loglikelihood_rolling`: every token of every document, once.

    The first window of a document begins with the prefix token (BOS, or EOS if there is none).
    Later windows begin with one token of context, and the last one is extended to full length by
    more context.
    """

    def windows(ids: Iterable[int], prefix: int | None) -> Iterator[ScoredWindow]:
        if prefix is None:
            raise BadInput("protocol rolling needs a tokenizer with a BOS or an EOS token.")
        stream = iter(ids)
        window: deque[int] = deque([prefix], maxlen=context)
        while new := list(itertools.islice(stream, context - 1)):
            window.extend(new)
            yield ScoredWindow(list(window), len(window) - len(new))

    return Protocol(
        "rolling",
        context,
        special_tokens=False,
        per_document=True,
        description=f"every token of each document, once, in windows of {context} tokens that "
        "begin with BOS or EOS, or with one token of context",
        windows=windows,
    )


PROTOCOLS = {"exl3": exl3, "llama.cpp": llama_cpp, "sliding": sliding, "rolling": rolling}


@dataclass
class Tally:
    """Running sums over a text: two numbers per window, whatever its length."""

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0
    not_finite: int = 0
    bytes: int = 0
    words: int = 0

    def add(self, nll: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Add one window's NLL per token [n], in nats."""
        self.sums.append(float(nll.sum()))
        self.counts.append(len(nll))
        self.tokens += len(nll)
        self.total += self.sums[-1]  # for progress only; the result uses math.fsum
        self.squares += float(nll @ nll)
        self.not_finite += len(nll) - int(np.isfinite(nll).sum())


@dataclass(frozen=True)
class Perplexity:
    """The result. Errors are standard errors, by the delta method: d exp(x) = exp(x) dx.

    `standard_error` treats windows as independent, but not the tokens within one; it is None for a
    single window. `standard_error_iid` treats all tokens as independent, as llama.cpp does.
    `bits_per_byte` and `word_perplexity` are lm-evaluation-harness', for protocols that score whole
    documents.
    """

    perplexity: float
    standard_error: float | None
    standard_error_iid: float
    nll: float
    tokens: int
    windows: int
    bits_per_byte: float | None
    word_perplexity: float | None


def result_of(tally: Tally, protocol: Protocol) -> Perplexity:
    """Return the perplexity of all tokens in `tally`; `BadInput` if there are none."""
    n = tally.tokens
    if not n:
        raise BadInput(
            f"the text has no token to score by protocol {protocol.name} ({protocol.description}); "
            "give a longer text, a smaller --context-length or --protocol sliding."
        )
    if tally.not_finite:
        raise BadInput(
            f"{tally.not_finite} of {n} scored tokens have a log-probability that is not finite: "
            "the checkpoint or its kernels are broken, and a perplexity would hide it."
        )
    total = math.fsum(tally.sums)
    nll = total / n
    value = math.exp(nll)
    several = len(tally.sums) > 1
    clustered = clustered_mean(np.array(tally.sums), np.array(tally.counts)) if several else None
    variance = max(0.0, tally.squares / n - nll**2)
    whole = protocol.per_document
    return Perplexity(
        perplexity=value,
        standard_error=None if clustered is None else value * clustered.standard_error,
        standard_error_iid=value * math.sqrt(variance / (n - 1)) if n > 1 else math.nan,
        nll=nll,
        tokens=n,
        windows=len(tally.sums),
        bits_per_byte=total / tally.bytes / math.log(2) if whole else None,
        word_perplexity=math.exp(total / tally.words) if whole else None,
    )


def evaluate(
    llm: LLM,
    texts: Iterable[str],
    protocol: Protocol,
    tokenizer: Any,
    *,
    progress: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Score `texts` by `protocol`, `BATCH_TOKENS` tokens at a time.

    `texts` are documents or, if the protocol joins them, pieces of one text.
    """
    tally = Tally()
    score_all(llm, all_windows(texts, protocol, tokenizer, tally), tally, progress=progress)
    return tally


def score_all(
    llm: LLM,
    windows: Iterable[ScoredWindow],
    tally: Tally,
    *,
    progress: Callable[[Tally], None] = lambda _: None,
) -> None:
    """Score windows, `BATCH_TOKENS` tokens at a time, and add them to a tally."""
    for batch in batches(windows):
        for nll in score_windows(llm, batch):
            tally.add(nll)
        progress(tally)


def all_windows(
    texts: Iterable[str], protocol: Protocol, tokenizer: Any, tally: Tally
) -> Iterator[ScoredWindow]:
    """Cut all texts into windows, each document separately or all as one text."""
    first = tokenizer.bos_token_id
    if not protocol.per_document:
        ids = itertools.chain.from_iterable(tokenized(texts, protocol, tokenizer))
        yield from protocol.windows(ids, first if adds_bos(tokenizer) else None)
        return
    first = tokenizer.eos_token_id if first is None else first
    for text in texts:
        tally.bytes += len(text.encode())
        tally.words += len(re.split(r"\s+", text))  # lm-evaluation-harness' own definition
        yield from protocol.windows(encode(tokenizer, text, special=False), first)


def tokenized(texts: Iterable[str], protocol: Protocol, tokenizer: Any) -> Iterator[list[int]]:
    """Tokenize pieces of one text; special tokens are added once, at its start."""
    for number, text in enumerate(texts):
        yield encode(tokenizer, text, special=protocol.special_tokens and number == 0)


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the token ids of a text, without the end-of-text token that some tokenizers add."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with a beginning-of-text token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def batches(windows: Iterable[ScoredWindow]) -> Iterator[list[ScoredWindow]]:
    """Group windows into batches of at least `BATCH_TOKENS` tokens."""
    batch: list[ScoredWindow] = []
    held = 0
    for window in windows:
        batch.append(window)
        held += len(window.ids)
        if held >= BATCH_TOKENS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def score_windows(
    llm: LLM, windows: list[ScoredWindow]
) -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    """Yield each window's NLL per scored token, in nats."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=window.ids) for window in windows]
    params = [
        SamplingParams(score_mode=True, max_tokens=0, score_start=window.score_from - 1)
        for window in windows
    ]
    for output in llm.generate(prompts, params, use_tqdm=False):
        yield -output.prompt_logprobs.logprobs.astype(np.float64)
