"""Check that everything quantgate uses of vLLM exists unchanged in a version.

    python tools/check_vllm.py                       # the installed version
    python tools/check_vllm.py newest
    python tools/check_vllm.py --markdown 0.32.0 0.33.0 > docs/vllm-versions.md

pip downloads a version's wheel from its configured index; the sources are read, not imported.
Exits 1 if something is missing or differs, 2 if a version is not available.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path

from quantgate import vllm_plugin
from quantgate.formats.kernels import RULES
from quantgate.patches.scoremode.hooks import HOOKS, Hook, misfit, vllm_version
from quantgate.reporting.markdown import markdown_table
from vllm_sources import (
    Definition,
    SourceError,
    Sources,
    installed_sources,
    signature_of,
    wheel_sources,
)

SOURCE = Path(vllm_plugin.__file__).parent
COMMAND = "python tools/check_vllm.py"
KERNELS = "vllm.model_executor.kernels.linear"
RULES_IN = "quantgate/formats/kernels.py"

# The attributes that hooks read besides their arguments, by module and class.
ATTRIBUTES = {
    "vllm.config ModelConfig": "get_vocab_size hf_config max_model_len pooler_config runner_type",
    "vllm.config VllmConfig": "additional_config cache_config model_config use_v2_model_runner",
    "vllm.entrypoints.llm LLM": "apply_model collective_rpc generate llm_engine",
    "vllm.model_executor.kernels.linear": (
        "_POSSIBLE_FP8_BLOCK_KERNELS _POSSIBLE_FP8_KERNELS _POSSIBLE_INT8_KERNELS "
        "_POSSIBLE_KERNELS _POSSIBLE_MXFP4_KERNELS _POSSIBLE_MXFP8_KERNELS _POSSIBLE_NVFP4_KERNELS"
    ),
    "vllm.model_executor.layers.fused_moe FusedMoEMethodBase": (
        "apply create_weights moe moe_kernel process_weights_after_loading"
    ),
    "vllm.model_executor.layers.fused_moe.routed_experts RoutedExperts": (
        "activation apply_router_weight_on_input expert_map forward_modular local_num_experts "
        "quant_method"
    ),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner MoERunner": "routed_scaling_factor",
    "vllm.model_executor.layers.logits_processor LogitsProcessor": (
        "forward logits_as_input scale soft_cap"
    ),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors "
    "CompressedTensorsConfig": "_is_fp8_w4a8 ignore",
    "vllm.model_executor.layers.vocab_parallel_embedding VocabParallelEmbedding": (
        "quant_method shard_indices tp_size"
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding VocabParallelEmbeddingShardIndices": (
        "num_org_elements org_vocab_start_index"
    ),
    "vllm.outputs CompletionOutput": "text token_ids",
    "vllm.outputs PoolingRequestOutput": "outputs",
    "vllm.outputs RequestOutput": "num_cached_tokens outputs prompt_logprobs prompt_token_ids",
    "vllm.renderers.base BaseRenderer": "default_cmpl_tok_params render_cmpl",
    "vllm.sampling_params BeamSearchParams": "beam_width",
    "vllm.sampling_params SamplingParams": (
        "clone detokenize extra_args from_optional ignore_eos logprobs max_tokens n "
        "prompt_logprobs skip_reading_prefix_cache stop"
    ),
    "vllm.v1.core.kv_cache_manager KVCacheManager": "coordinator",
    "vllm.v1.engine EngineCoreOutput": "new_prompt_logprobs_tensors",
    "vllm.v1.engine EngineCoreRequest": "prompt_token_ids sampling_params",
    "vllm.v1.engine.input_processor InputProcessor": "model_config renderer vllm_config",
    "vllm.v1.engine.llm_engine LLMEngine": "engine_core model_config vllm_config",
    "vllm.v1.engine.logprobs LogprobsProcessor": "_verify_tokens prompt_logprobs tokenizer",
    "vllm.v1.engine.output_processor RequestState": "logprobs_processor prompt_token_ids",
    "vllm.v1.outputs LogprobsTensors": "logprob_token_ids logprobs to_cpu_nonblocking",
    "vllm.v1.request Request": "num_tokens sampling_params",
    "vllm.v1.worker.gpu.input_batch InputBatch": (
        "idx_mapping_np num_computed_prefill_tokens_np num_scheduled_tokens query_start_loc_np "
        "req_ids"
    ),
    "vllm.v1.worker.gpu.sample.prompt_logprob PromptLogprobsWorker": "uses_prompt_logprobs",
    "vllm.v1.worker.gpu_input_batch CachedRequestState": (
        "num_computed_tokens prompt_token_ids sampling_params"
    ),
    "vllm.v1.worker.gpu_input_batch InputBatch": "req_id_to_index",
    "vllm.v1.worker.gpu_model_runner GPUModelRunner": (
        "_sync_device input_batch model num_prompt_logprobs query_start_loc requests"
    ),
}


@dataclass(frozen=True)
class Touched:
    """One name that the project uses in a module, e.g. "Class.member"; hooked, or only read."""

    module: str
    name: str
    hook: Hook | None = None


@dataclass(frozen=True)
class Answer:
    """How a version provides it: `problem` is empty if it fits, or if it is `absent` and optional.

    `others` are the parameters that a hook passes on.
    """

    problem: str = ""
    others: tuple[str, ...] = ()
    absent: bool = False


@cache
def touched() -> list[Touched]:
    """Return everything that the project uses of vLLM: hooks, attributes and imports."""
    hooks = [Touched(hook.module, hook.name, hook) for hook in HOOKS]
    attributes = [
        Touched(module, f"{owner}.{name}" if owner else name)
        for key, names in ATTRIBUTES.items()
        for module, _, owner in [key.partition(" ")]
        for name in names.split()
    ]
    return [*dict.fromkeys([*hooks, *attributes, *_imports()])]


def _imports() -> Iterator[Touched]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm":
                yield from (Touched(str(node.module), alias.name) for alias in node.names)


def look_up(sources: Sources, item: Touched) -> Answer:
    """Return how a version provides one name."""
    node = sources.member(item.module, item.name)
    if node is None:
        return Answer(absent=True) if item.hook and item.hook.optional else Answer("missing")
    if item.hook is None:
        return Answer()
    if not isinstance(node, Definition):
        return Answer("no function")
    if isinstance(node, ast.AsyncFunctionDef) != item.hook.is_async:
        return Answer("async" if not item.hook.is_async else "not async")
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if ("classmethod" in decorators) != item.hook.on_class or "staticmethod" in decorators:
        return Answer("another kind of method")
    parameters = list(signature_of(node).parameters.values())
    theirs = Signature(parameters[1 if "." in item.name else 0 :])
    named = item.hook.signature.parameters
    others = tuple(
        p.name
        for p in theirs.parameters.values()
        if p.name not in named or p.name in _optional(item.hook)
    )
    return Answer(misfit(item.hook.signature, theirs) or "", others)


def _optional(hook: Hook) -> list[str]:
    return [n for n, p in hook.signature.parameters.items() if p.default is not Parameter.empty]


def rows(versions: Sequence[Sources]) -> Iterator[list[str]]:
    """Yield the table's rows: one per class or module, with one cell per version."""
    items = touched()
    answers = {item: [look_up(sources, item) for sources in versions] for item in items}
    owners = dict.fromkeys((item.module, _owner(item)) for item in items)
    for module, owner in sorted(owners):
        mine = [item for item in items if (item.module, _owner(item)) == (module, owner)]
        hooked = sorted({_short(item) for item in mine if item.hook})
        read = sorted({_short(item) for item in mine if not item.hook} - set(hooked))
        columns = [
            _cell(
                mine,
                [answers[item][place] for item in mine],
                [answers[item][max(place - 1, 0)] for item in mine],
            )
            for place in range(len(versions))
        ]
        where = f"`{module}`" + (f" `{owner}`" if owner else "")
        yield [where, _code(hooked), _code(read), *columns]


def _owner(item: Touched) -> str:
    return item.name.rpartition(".")[0]


def _short(item: Touched) -> str:
    return item.name.rpartition(".")[2]


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def _cell(items: Sequence[Touched], now: Sequence[Answer], before: Sequence[Answer]) -> str:
    """Return the problems, or a tick and the passed-on parameters that changed since `before`."""
    notes = [f"`{_short(i)}`: {a.problem}" for i, a in zip(items, now, strict=True) if a.problem]
    if notes:
        return "**" + "; ".join(notes) + "**"
    notes = [f"no `{_short(i)}`, not needed" for i, a in zip(items, now, strict=True) if a.absent]
    for item, new, old in zip(items, now, before, strict=True):
        if new.absent or old.absent:
            continue
        changed = [f"+{name}" for name in new.others if name not in old.others]
        changed += [f"−{name}" for name in old.others if name not in new.others]
        notes += [f"`{_short(item)}` {', '.join(changed)}"] if changed else []
    return "; ".join(["✓", *notes])


def without_rule(sources: Sources) -> list[str]:
    """Return a version's linear kernels for which the reference has no rule."""
    tree = sources.tree(KERNELS)
    choices = [
        (ast.unparse(key), kernels)
        for node in (tree.body if tree else [])
        if isinstance(node, ast.AnnAssign) and "_POSSIBLE_" in ast.unparse(node.target)
        if isinstance(node.value, ast.Dict)
        for key, kernels in zip(node.value.keys, node.value.values, strict=True)
        if key is not None and isinstance(kernels, ast.List)
    ]
    names = {
        ast.unparse(kernel)
        for platform, kernels in choices
        if platform.endswith((".CUDA", ".CPU"))
        for kernel in kernels.elts
    }
    return sorted(names - RULES.keys())


def problems(sources: Sources) -> list[str]:
    """Return a line for each name that a version lacks or defines differently."""
    found = []
    for item in touched():
        if problem := look_up(sources, item).problem:
            found.append(f"  {item.hook or f'{item.module}.{item.name}'}: {problem}")
    return found + [f"  {name}: no rule in {RULES_IN}" for name in without_rule(sources)]


def report(versions: Sequence[Sources]) -> str:
    """Return the report for the terminal."""
    lines = []
    for sources in versions:
        wrong = problems(sources)
        lines.append(
            f"vLLM {sources.version}: {len(touched()) - len(wrong)} of {len(touched())} fit"
        )
        lines += wrong
    return "\n".join(lines)


def document(versions: Sequence[Sources]) -> str:
    """Return the content of docs/vllm-versions.md."""
    names = [sources.version for sources in versions]
    table = markdown_table(["in vLLM", "hooked", "used", *names], rows(versions))
    return (
        "# What Quantgate uses of vLLM\n\n"
        "This page is generated from the sources of each version:\n\n"
        f"    {COMMAND} --markdown {' '.join(names)}\n\n"
        "✓ means that everything in the row exists, and that each hooked method has the parameters "
        "its hook names, in\nplace and with the same defaults. A hook passes every other parameter "
        "on: + and − mark those added and removed\nsince the version to the left.\n\n"
        f"{table.rstrip()}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns 1 if a version does not fit, 2 on a user error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help='or "newest"')
    parser.add_argument("--markdown", action="store_true", help="write the page of the docs")
    options = parser.parse_args(arguments)
    try:
        versions = [wheel_sources(None if v == "newest" else v) for v in options.versions]
        versions = versions or [installed_sources(vllm_version())]
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    print(document(versions) if options.markdown else report(versions))
    return 1 if any(map(problems, versions)) else 0


if __name__ == "__main__":
    sys.exit(main())
