"""The model itself, a subclass of `lm_eval.api.model.LM`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from quantgate.errors import BadInput
from quantgate.measuring.engine import running_engine
from quantgate.measuring.environment import library_versions
from quantgate.measuring.session import kernel_fingerprint
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.passage import tokenizer_of

# Prompts given to vLLM at a time: enough to fill its batches to the end.
PROMPTS_AT_ONCE = 4096
# What lm-evaluation-harness passes to every backend, and has no meaning here.
NOT_FOR_VLLM = ("device", "batch_size", "max_batch_size", "trust_remote_code")


class Continuation(NamedTuple):
    """One request: the log-likelihood of `tokens`, given `context`."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class Prompt:
    """One scoring request to vLLM, which answers one or several continuations."""

    ids: tuple[int, ...]
    start: int
    """The first scored row; row i predicts token i + 1."""
    targets: list[int] | None
    """Continuations of one token each, after the same context; None for the prompt's own."""
    asked_by: list[int] = field(default_factory=list)
    """The continuations' indices, in the order of the targets."""


@register_model("quantgate")
class QuantgateLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """A checkpoint that vLLM serves, with exact log-likelihoods.

    Takes `pretrained`, `dtype`, `max_length` (the most tokens that the model is fed, as lm-eval's
    `hf` backend has it), `add_bos_token`, `prefix_token_id`, `max_gen_toks`, the fields of
    `EngineSettings` that matter here, and vLLM's own engine arguments.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        **engine: Any,
    ) -> None:
        super().__init__()
        if engine.get("trust_remote_code"):
            raise BadInput("trust_remote_code is not supported: no code of a checkpoint is run.")
        for name in NOT_FOR_VLLM:
            engine.pop(name, None)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.max_gen_toks = int(max_gen_toks)
        self.tokenizer = _tokenizer(pretrained)
        settings = EngineSettings(
            # The engine also has to sample a token.
            max_model_len=None if max_length is None else int(max_length) + 1,
            tensor_parallel_size=int(engine.pop("tensor_parallel_size", 1)),
            enforce_eager=bool(engine.pop("enforce_eager", False)),
        )
        stack = ExitStack()
        self.llm = stack.enter_context(
            running_engine(
                Path(pretrained),
                settings=settings,
                dtype=dtype,
                skip_tokenizer_init=False,
                **engine,
            )
        )
        self.close = weakref.finalize(self, stack.close)

    @property
    def max_length(self) -> int:
        """The most tokens that the model is fed."""
        return int(self.llm.llm_engine.model_config.max_model_len) - 1

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS if there is none."""
        given = (self.custom_prefix_token_id, self.tokenizer.bos_token_id)
        return int(next((one for one in given if one is not None), self.eot_token_id))

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm-eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokenize as the `hf` backend does: BOS is not added to a text that begins with it."""
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            wanted = False
        options = {} if wanted is None else {"add_special_tokens": wanted}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the prompt that the tokenizer's template makes of them."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results: versions, dtype and kernels."""
        kernels, emulated = kernel_fingerprint(self.llm)
        return {
            "model_dtype": str(self.llm.llm_engine.model_config.dtype),
            "quantgate": {
                "versions": library_versions(),
                "kernels": kernels,
                "emulated": list(emulated),
            },
        }

    # Log-likelihoods -----------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one."""
        asked = [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        prompts = prompts_for(asked, self.max_length + 1)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        bar = tqdm(total=len(asked), disable=disable_tqdm, desc="Scoring continuations")
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            for prompt, scores in self._scored(prompts[start : start + PROMPTS_AT_ONCE]):
                for index, answer in zip(prompt.asked_by, _answers(prompt, scores), strict=True):
                    answers[index] = answer
                    if (key := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                bar.update(len(prompt.asked_by))
        bar.close()
        return answers

    def _scored(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Any]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        inputs, params = [], []
        for prompt in prompts:
            more: Any = {} if prompt.targets is None else {"target_token_ids": [prompt.targets]}
            inputs.append(TokensPrompt(prompt_token_ids=list(prompt.ids), **more))
            params.append(SamplingParams(score_mode=True, max_tokens=0, score_start=prompt.start))
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            yield prompt, output.prompt_logprobs

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of `max_length` tokens."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in cut]
            counts.append(len(windows) - before)
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scored)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # Text ----------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what vLLM generates after each context, up to a stop sequence."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        eos = self.tokenizer.decode(self.eot_token_id)
        inputs, params, stops = [], [], []
        for context, given in (request.args for request in requests):
            options = normalize_gen_kwargs(given, default_max_gen_toks=self.max_gen_toks)
            until = handle_stop_sequences(options.pop("until", None), eos=eos)
            if not options.pop("do_sample"):
                options["temperature"] = 0.0  # vLLM's default is 1
            ids, most = maybe_truncate(
                self.tok_encode(context),
                max_gen_toks=int(options.pop("max_gen_toks")),
                max_model_len=self.max_length,
            )
            inputs.append(TokensPrompt(prompt_token_ids=ids))
            # HF's defaults, which stop sequences that are special tokens need.
            special = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
            params.append(SamplingParams(max_tokens=most, stop=until, **{**special, **options}))
            stops.append(until)
        outputs = self.llm.generate(inputs, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output, until in zip(requests, outputs, stops, strict=True):
            texts.append(postprocess_generated_text(output.outputs[0].text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def prompts_for(asked: Sequence[Continuation], longest: int) -> list[Prompt]:
    """Return the scoring requests for continuations, of at most `longest` tokens each.

    Contexts are cut at the left. Continuations of one token after the same context are targets of
    one request. Prompts with a common beginning follow one another, and share the prefix cache.
    """
    prompts: dict[tuple[tuple[int, ...], int | None], Prompt] = {}
    for index, (context, tokens) in enumerate(asked):
        if not tokens:
            continue  # it merges with the context's last token; lm-eval's backends answer 0
        if len(tokens) >= longest:
            raise BadInput(
                f"a continuation of {len(tokens)} tokens cannot be scored with max_length="
                f"{longest - 1}; raise max_length."
            )
        ids = (*context, *tokens)[-longest:]
        start = len(ids) - len(tokens) - 1
        if len(tokens) > 1:
            found = prompts.setdefault((ids, start), Prompt(ids, start, None))
        else:
            found = prompts.setdefault((ids[:-1], None), Prompt(ids, start, []))
            assert found.targets is not None
            found.targets.append(tokens[0])
        found.asked_by.append(index)
    return sorted(prompts.values(), key=lambda prompt: prompt.ids)


def _answers(prompt: Prompt, scores: Any) -> list[tuple[float, bool]]:
    """Return the answer for each continuation of a prompt."""
    if prompt.targets is None:
        whole = float(scores.logprobs.sum(dtype="float64")), bool(scores.greedy.all())
        return [whole] * len(prompt.asked_by)
    columns = zip(scores.logprobs[0].tolist(), scores.greedy[0].tolist(), strict=True)
    return list(columns)


def _tokenizer(pretrained: str) -> Any:
    try:
        return tokenizer_of(Path(pretrained))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{pretrained}: no tokenizer to be had ({reason}).") from None
