"""The reference: streamed, and right for what models differ in; its cache, verified."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantgate.errors import BadInput
from quantgate.measuring import engine, reference
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.probe import Probe, Window

IDS = tuple(int(i) for i in np.random.default_rng(0).integers(3, 500, 60))
SHORT = Probe(
    "short",
    512,
    (Window("a", "s", 1, IDS[:40], ""), Window("b", "s", 5, IDS[20:], "")),
)
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def small_models() -> dict[str, Any]:
    """What models differ in: biases, tied heads, norms of queries and keys, soft caps, experts."""
    import transformers as hf

    return {
        "llama-biases": hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        "qwen2": hf.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
        "qwen3-tied": hf.Qwen3Config(**SMALL, tie_word_embeddings=True),
        "gemma2-soft-caps": hf.Gemma2Config(
            **SMALL,
            final_logit_softcapping=5.0,
            attn_logit_softcapping=20.0,
            sliding_window=16,
            query_pre_attn_scalar=16,
        ),
        "gemma3-sliding": hf.Gemma3TextConfig(**SMALL, sliding_window=16, query_pre_attn_scalar=16),
        "granite-multipliers": hf.GraniteConfig(
            **{k: v for k, v in SMALL.items() if k != "head_dim"},
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
        ),
        "qwen3-moe": hf.Qwen3MoeConfig(
            **SMALL,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
        ),
    }


def save_random(config: Any, directory: Path) -> Any:
    """Save a random model in float32 and return it; no parameter keeps an initial 0 or 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    # HF's sdpa leaves Gemma 2's soft cap out.
    attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


@torch.inference_mode()
def unstreamed(model: Any, probe: Probe) -> np.ndarray[Any, Any]:
    """Score with all layers at once, on as many rows a product as the streamed model has.

    A product of another number of rows may be another kernel, which rounds otherwise; of the same
    rows, in the same process, streaming changes no operation, and so no bit of any score.
    """
    parts = []
    for window in probe.windows:
        ids = torch.tensor(window.ids)
        output = model(ids[None, :-1], logits_to_keep=window.scored, use_cache=False)
        logprobs = output.logits[0].log_softmax(-1)
        parts.append(logprobs.gather(1, ids[window.score_from :, None])[:, 0].numpy())
    return np.concatenate(parts)


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("name", sorted(small_models()))
def test_a_streamed_model_is_the_unstreamed_one(name: str, tmp_path: Path) -> None:
    model = save_random(small_models()[name], tmp_path)
    scores = reference.measure(tmp_path, SHORT, dtype="float32", announce=quiet).logprob
    expected = unstreamed(model, SHORT)
    assert np.abs(expected).max() > 1  # not a model that says the same of everything
    np.testing.assert_array_equal(scores, expected)


def test_a_moe_models_engine_agrees(tmp_path: Path) -> None:
    """vLLM fuses the experts too, from the same files, and computes the same."""
    save_random(small_models()["qwen3-moe"], tmp_path)
    served, _ = engine.measure(
        tmp_path,
        SHORT,
        settings=EngineSettings(enforce_eager=True),
        dtype="float32",
        announce=quiet,
    )
    scores = reference.measure(tmp_path, SHORT, dtype="float32", announce=quiet).logprob
    np.testing.assert_allclose(served.logprob, scores, rtol=0, atol=1e-5)


def test_an_fp8_cache_in_the_reference_is_quantized_keys_and_values(root: Path) -> None:
    build = root / "build"
    with_cache, without = (
        reference.measure(build / name, SHORT, dtype="float32", announce=quiet).logprob
        for name in ("tiny-llama-fp8-kv", "tiny-llama-fp8")
    )
    assert 1e-4 < np.abs(with_cache - without).mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', not 'compressed-tensors'"),
        ({"transform_config": {"a": 1}}, "transform_config rotates weights and inputs"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config stores weights sparsely"),
        (
            {"kv_cache_scheme": {"type": "int", "strategy": "tensor"}},
            "kv_cache_scheme is not FP8",
        ),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "config group 'g' has no weights"),
        ({"ignore": ["re:("]}, r"'re:\(' is not a regular expression"),
        ({"ignore": []}, "its head, 'lm_head', is quantized"),
    ],
)
def test_what_the_reference_has_no_rule_for_is_refused(
    quantized_copy: Path, change: dict[str, Any], message: str
) -> None:
    path = quantized_copy / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        reference.measure(quantized_copy, SHORT, dtype="float32", announce=quiet)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("weight_scale", "q_proj: the checkpoint has no weight_scale for this layer, only"),
        ("weight_shape", "q_proj: the checkpoint has no weight_shape for this layer, only"),
    ],
)
def test_a_tensor_that_is_missing_is_named(quantized_copy: Path, damage: str, message: str) -> None:
    path = quantized_copy / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.2.self_attn.q_proj.{damage}"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BadInput, match=message):
        reference.measure(quantized_copy, SHORT, dtype="float32", announce=quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head_dim": 128},
            r"'model\.layers\.0\.self_attn\.q_proj\.weight' is \[256, 256\] in the weights, but "
            r"config\.json implies \[512, 256\]; correct its sizes",
        ),
        (
            {"vocab_size": 1088},
            r"'model\.embed_tokens\.weight' is \[1024, 256\] .* implies \[1088, 256\]",
        ),
        ({"intermediate_size": 640}, r"gate_proj\.weight' is \[512, 256\] .* implies \[640, 256\]"),
    ],
)
def test_a_config_that_contradicts_its_tensors_is_refused(
    quantized_copy: Path, change: dict[str, int], message: str
) -> None:
    path = quantized_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        reference.measure(quantized_copy, SHORT, dtype="float32", announce=quiet)


LAYERS = 24


def test_memory_is_two_layers_embeddings_and_activations(tmp_path: Path) -> None:
    """On a random model of 24 layers, in a process of its own, above what an empty model takes.

    One of two such layers goes first: what libraries load and allocate once is no layer's.
    """
    import transformers as hf

    sizes = {**SMALL, "hidden_size": 768, "intermediate_size": 3072}
    save_random(hf.LlamaConfig(**{**sizes, "num_hidden_layers": 2}), tmp_path / "small")
    model = save_random(hf.LlamaConfig(**{**sizes, "num_hidden_layers": LAYERS}), tmp_path)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - LAYERS * layer
    del model
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from test_reference import SHORT, quiet, unstreamed\n"
        "from quantgate.measuring.streamed_model import StreamedModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "import torch; torch.set_num_threads(1)\n"
        "directory = Path(sys.argv[1])\n"
        "def resident(what):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(what))\n"
        "first = StreamedModel(directory / 'small', 'float32')\n"
        "first.scores(SHORT.windows, first.last_hidden(SHORT.windows, quiet))\n"
        "model = StreamedModel(directory, 'float32')\n"
        "before = resident('VmRSS')\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the high-water mark starts anew
        "hidden = model.last_hidden(SHORT.windows, quiet)\n"
        "scores, _ = model.scores(SHORT.windows, hidden)\n"
        "peak = resident('VmHWM') - before\n"
        "whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()\n"
        "expected = unstreamed(whole, SHORT)\n"
        "print(json.dumps([peak, scores.tolist(), expected.tolist()]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, scores, expected = json.loads(run.stdout.splitlines()[-1])
    activations = 20 * max(len(w.ids) for w in SHORT.windows) * 3072 * 4
    print(
        f"peak {peak / 2**20:.0f} MiB above an empty model; a layer is {layer / 2**20:.0f} MiB, "
        f"embeddings and head {rest / 2**20:.0f}, the model {LAYERS * layer / 2**20:.0f}"
    )
    assert peak <= 2 * layer + rest + activations
    assert scores == expected
