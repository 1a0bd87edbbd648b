"""Score mode beside vLLM's prefix cache, in models whose layers keep different kinds of it."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from harness import SMALL, make_model
from numpy.typing import NDArray

from quantgate.measuring.engine import running_engine
from quantgate.patches.scoremode import hooks
from quantgate.patches.scoremode.inputs import CHECKED
from quantgate.patches.scoremode.prefix_cache import MANAGER
from quantgate.subject.checkpoint import EngineSettings

BLOCK = 32
TOKENS = 200
# Before, at, and after the edges of blocks and windows, and the last rows.
STARTS = (0, 1, 31, 32, 33, 64, 65, 100, 130, 191, 192, 197, 198, 199)

# By the kind of their layers' caches: the config's class, and the settings that make it so.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("LlamaConfig", {}),
    "sliding window": ("MistralConfig", {"sliding_window": 40}),
    "sliding window and full": (
        "Gemma3TextConfig",
        {
            "sliding_window": 40,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attn_implementation": "eager",
        },
    ),
    # A short convolution's state is kept as Mamba's is. One head: vLLM 0.32.0's CPU build
    # serves this architecture wrong with more, with score mode or without.
    "state and full": (
        "Lfm2Config",
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "conv_dim": 64,
            "block_dim": 64,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True,  # vLLM ties them, whatever the config says
        },
    ),
}


class Case(NamedTuple):
    """A model that is served, two prompts, and HF's log-probabilities [rows, vocabulary]."""

    llm: Any
    prompts: tuple[list[int], list[int]]
    expected: tuple[NDArray[np.float64], NDArray[np.float64]]


def settings() -> EngineSettings:
    return EngineSettings(enforce_eager=True, max_model_len=256, max_num_batched_tokens=96)


@pytest.fixture(scope="module", params=MODELS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    import torch

    config_class, special = MODELS[request.param]
    directory = tmp_path_factory.mktemp("model")
    small = {**SMALL, "num_hidden_layers": 4, "tie_word_embeddings": False}
    model = make_model(directory, config_class, spread=3.0, **{**small, **special})
    generator = np.random.default_rng(0)
    one, other = (generator.integers(3, 1000, TOKENS).tolist() for _ in range(2))
    with torch.inference_mode():
        scores = model.double()(torch.tensor([one, other])).logits.log_softmax(dim=-1).numpy()
    assert scores.std(axis=-1).mean() > 1.5  # not flat
    with running_engine(
        directory,
        settings=settings(),
        dtype="float32",
        block_size=BLOCK,
        enable_prefix_caching=True,
    ) as llm:
        yield Case(llm, (one, other), (scores[0], scores[1]))


def serve(llm: Any, *asked: tuple[list[int], dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
    params = [
        SamplingParams(**{"temperature": 0.0, "detokenize": False, **own}) for _, own in asked
    ]
    answers: list[Any] = llm.generate(prompts, params, use_tqdm=False)
    return answers


def scoring(start: int) -> dict[str, Any]:
    return {"score_mode": True, "score_start": start}


GENERATING = {"max_tokens": 3, "ignore_eos": True}


def errors(answer: Any, ids: list[int], expected: NDArray[np.float64], start: int) -> float:
    """Return the largest difference of a prompt's scores from HF's, in nats."""
    rows = np.arange(start, len(ids) - 1)
    scores = answer.prompt_logprobs
    assert scores.token_ids.tolist() == ids[start + 1 :]
    differences = np.abs(scores.logprobs - expected[rows, ids[start + 1 :]])
    return float(differences.max(initial=0.0))


def test_scores_are_hfs_from_every_row_on_cached_and_not(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixed with requests that generate, which read and fill the same cache."""
    (one, other), (of_one, of_other) = case.prompts, case.expected
    largest, cached = 0.0, []
    for start in STARTS:
        first, second, generated = serve(
            case.llm,
            (one, scoring(start)),
            (other, scoring(max(0, start - 40))),
            (one[:150], GENERATING),
        )
        largest = max(
            largest,
            errors(first, one, of_one, start),
            errors(second, other, of_other, max(0, start - 40)),
        )
        assert generated.outputs[0].token_ids[0] == of_one[149].argmax()
        assert len(generated.outputs[0].token_ids) == 3
        assert first.num_cached_tokens <= start
        cached.append(first.num_cached_tokens)
    with capsys.disabled():
        print(f"\nlargest difference from HF {largest:.1e} nat; cached of {STARTS}: {cached}")
    assert largest <= 1e-5
    assert max(cached) >= 128  # a whole cache was there to be read


@pytest.fixture(scope="module")
def llm(root: Path) -> Iterator[Any]:
    """The unquantized tiny model, with full attention."""
    model = root / "fixtures" / "tiny" / "llama"
    with running_engine(model, settings=settings(), dtype="float32", block_size=BLOCK) as llm:
        yield llm


def prompt(seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(6, 1024, TOKENS).tolist()
    return ids


def get_computed_blocks_0_33(
    self: Any, request: Any, max_cache_hit_length: int | None = None
) -> tuple[Any, int, int]:
    """vLLM 0.33.0's `KVCacheManager.get_computed_blocks`, as its sources have it."""
    if not self.prefix_cache_lookup_enabled(request):
        return self.empty_kv_cache_blocks, 0, 0
    if max_cache_hit_length is None:
        max_cache_hit_length = request.num_tokens - 1
    blocks, hit, uncached = self.coordinator.find_longest_cache_hit(
        request.block_hashes, max_cache_hit_length
    )
    return self.create_kv_cache_blocks(blocks), hit, hit + uncached if uncached else 0


@pytest.mark.parametrize("limit", [None, 100])
def test_an_engine_with_0_33s_signature_serves_and_scores(
    limit: int | None, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scheduler gives the cache manager a second argument, with every request."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    ids = prompt(1 if limit is None else 2)
    generated, whole = serve(llm, (ids, GENERATING), (ids, scoring(0)))
    made: Any = ModuleType(MANAGER)
    made.KVCacheManager = type(
        "KVCacheManager", (KVCacheManager,), {"get_computed_blocks": get_computed_blocks_0_33}
    )
    hooks.install_hooks(made)
    hooked = made.KVCacheManager.get_computed_blocks
    assert hooked is not get_computed_blocks_0_33
    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", hooked)
    monkeypatch.setattr(
        Scheduler,
        "_get_local_prefix_cache_hit",
        lambda self, request: (
            *self.kv_cache_manager.get_computed_blocks(request, limit),
            False,
        ),
    )
    again, *scored = serve(llm, (ids, GENERATING), *((ids, scoring(s)) for s in (0, 70, 150)))
    assert again.outputs[0].token_ids == generated.outputs[0].token_ids
    assert [a.num_cached_tokens for a in (again, *scored)] == (
        [192, 0, 64, 128] if limit is None else [96, 0, 64, 96]
    )
    for answer, start in zip(scored, (0, 70, 150), strict=True):
        expected = whole.prompt_logprobs.logprobs[start:]
        np.testing.assert_allclose(answer.prompt_logprobs.logprobs, expected, atol=1e-5, rtol=0)


def test_a_vllm_that_reads_its_cache_another_way_gets_a_refusal(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond score_start come from a cache, as from a KV connector: the engine lives on."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    ids = prompt(3)
    serve(llm, (ids, GENERATING))
    stock = KVCacheManager.get_computed_blocks.__wrapped__
    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", stock)
    scored, generated = serve(llm, (ids, scoring(70)), (ids, GENERATING))
    with pytest.raises(ValueError, match=r"got 7 of the 129 rows to score: .* score from row 0"):
        scored.prompt_logprobs.logprobs  # noqa: B018
    assert len(generated.outputs[0].token_ids) == 3
    (whole,) = serve(llm, (ids, scoring(0)))
    assert np.isfinite(whole.prompt_logprobs.logprobs).all()


def test_with_a_hook_off_scoring_is_refused_and_generating_is_served(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = "vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks(request)"
    monkeypatch.setitem(hooks._missing, MANAGER, [(hooks.SCORE_MODE, lacking)])
    monkeypatch.delattr(llm.llm_engine.input_processor, CHECKED, raising=False)
    with pytest.raises(RuntimeError, match=r"score mode does not support vLLM .*: it lacks vllm"):
        serve(llm, (prompt(4), scoring(0)))
    (generated,) = serve(llm, (prompt(4), GENERATING))
    assert len(generated.outputs[0].token_ids) == 3


def specs() -> dict[str, list[Any]]:
    """The specifications of cache groups, by what a model's layers keep."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = FullAttentionSpec(**shape)
    sliding = SlidingWindowSpec(**shape, sliding_window=20)
    mamba = MambaSpec(
        block_size=16, shapes=((256,),), dtypes=(torch.float32,), mamba_cache_mode="all"
    )
    return {
        "full": [full],
        "sliding": [sliding],
        "mamba": [mamba],
        "full and sliding": [full, sliding],
        "full and mamba": [full, mamba],
        "full, sliding and mamba": [full, sliding, mamba],
    }


@pytest.mark.parametrize(
    "kind",
    ["full", "sliding", "mamba", "full and sliding", "full and mamba", "full, sliding and mamba"],
)
def test_every_cache_manager_is_read_up_to_the_first_scored_row(kind: str) -> None:
    """vLLM's own managers, without a model: no Mamba layer runs on its CPU build."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    init_none_hash(sha256)
    groups = [KVCacheGroupSpec([str(n)], spec) for n, spec in enumerate(specs()[kind])]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=256,
        scheduler_block_size=16,
        hash_block_size=16,
    )

    def request_of(name: str, params: Any) -> Any:
        hasher = get_request_block_hasher(16, sha256)
        return Request(name, list(range(199)), params, None, block_hasher=hasher)

    first = request_of("first", sampling_params(None))
    blocks, hit, _ = manager.get_computed_blocks(first)
    assert (hit, manager.allocate_slots(first, 199, hit, blocks) is not None) == (0, True)
    manager.free(first)

    assert manager.get_computed_blocks(request_of("stock", sampling_params(None)))[1] == 192
    for start in (0, 1, 15, 16, 17, 100, 191, 192, 198):
        request = request_of(f"from {start}", sampling_params(start))
        blocks, hit, _ = manager.get_computed_blocks(request)
        assert hit == start // 16 * 16
        assert all(len(group) == hit // 16 for group in blocks.blocks)
        assert len(request.block_hashes) == 199 // 16


def sampling_params(start: int | None) -> Any:
    from vllm import SamplingParams

    from quantgate.patches.scoremode.request import SCORE_KEY, make_score_request

    if start is None:
        return SamplingParams()
    asked = make_score_request(range(200), None, start=start, vocab_size=200)
    params = SamplingParams(score_mode=True, score_start=start)
    params.extra_args = {SCORE_KEY: asked.to_wire()}
    return params
