"""The reference: streamed, and right for what models differ in; its cache, verified."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from small_models import SHORT, SMALL, quiet, save_random, small_models, unstreamed

from quantgate.errors import BadInput
from quantgate.measuring import reference, session
from quantgate.subject.checkpoint import EngineSettings


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
    served, _ = session.measure(
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
        "from small_models import SHORT, quiet, unstreamed\n"
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
    # What Python and the allocator take on the way; a third layer would be seven times as much.
    assert peak <= 2 * layer + rest + activations + 4 * 2**20
    assert scores == expected
