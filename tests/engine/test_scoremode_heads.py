"""Heads of every kind, on real engines: exact against float64, or refused by name."""

import gc
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import SMALL, make_model
from numpy.typing import NDArray

from quantgate.measuring.engine import running_engine
from quantgate.subject.checkpoint import EngineSettings

# What "exact" means: against float64 over the same hidden states and head, in nats.
MAXIMUM, MEAN = 1e-5, 1e-6
TOKENS = 200

# What makes a head special: the config's class, and the settings that do.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "padded vocabulary": ("LlamaConfig", {}),
    "tied": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 32}),
    "soft cap": ("Gemma2Config", {"final_logit_softcapping": 3.0, "head_dim": 32}),
    "logit scale": ("CohereConfig", {"logit_scale": 0.25}),
    "bias": ("PhiConfig", {}),
}


def engine(directory: Path, dtype: str = "float32", **extra: Any) -> AbstractContextManager[Any]:
    settings = EngineSettings(enforce_eager=True, max_model_len=256)
    return running_engine(directory, settings=settings, dtype=dtype, **extra)


@pytest.mark.parametrize("name", HEADS)
def test_a_models_own_head_is_scored_as_hf_does(name: str, tmp_path: Path) -> None:
    """Capping, scaling, padding, tying and bias are the model's own, in vLLM as in HF."""
    import torch
    from vllm import SamplingParams

    config_class, settings = HEADS[name]
    model = make_model(tmp_path, config_class, **{**SMALL, **settings})
    ids = np.random.default_rng(0).integers(3, 1000, TOKENS).tolist()
    with torch.inference_mode():
        logprob = model.double()(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
    expected = logprob.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    with engine(tmp_path) as llm:
        (output,) = llm.generate(
            [{"prompt_token_ids": ids}], SamplingParams(score_mode=True), use_tqdm=False
        )
    scores = output.prompt_logprobs
    assert scores.top1.max() < 1000
    np.testing.assert_array_equal(scores.top1, logprob.argmax(dim=1).numpy())
    # Two float32 forward passes in different orders; the head's own share is tested below.
    np.testing.assert_allclose(scores.logprobs, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab", [2048, 128256])
def test_scores_are_exact_for_the_models_own_hidden_states(
    dtype: str, tied: bool, vocab: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a float64 log-softmax; stock vLLM's error is printed beside it."""
    from vllm import SamplingParams

    write_random_llama(tmp_path, vocab, tied)
    ids = np.random.default_rng(0).integers(0, vocab, TOKENS).tolist()
    prompt = {"prompt_token_ids": ids}
    with engine(tmp_path, dtype, load_format="safetensors") as llm:
        params = SamplingParams(score_mode=True, score_hidden_states=True)
        (ours,) = llm.generate([prompt], params, use_tqdm=False)
        stock_params = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
        (stock,) = llm.generate([prompt], stock_params, use_tqdm=False)
        head = llm.apply_model(lambda model: model.lm_head.weight.double().numpy())[0][:vocab]
    scores = ours.prompt_logprobs
    exact = float64_scores(scores.hidden_states, head, np.array(ids[1:]))
    error = np.abs(scores.logprobs - exact)
    theirs = [stock.prompt_logprobs[i][ids[i]].logprob for i in range(1, TOKENS)]
    stock_error = np.abs(np.array(theirs) - exact)
    with capsys.disabled():
        print(
            f"\n{dtype}, {'tied' if tied else 'untied'}, vocabulary {vocab:,}: error in nats "
            f"{error.max():.1e} (mean {error.mean():.1e}); "
            f"stock {stock_error.max():.1e} (mean {stock_error.mean():.1e})"
        )
    assert error.max() <= MAXIMUM
    assert error.mean() <= MEAN


def write_random_llama(directory: Path, vocab: int, tied: bool) -> None:
    """A Llama whose logits spread like a trained model's: a standard deviation of about 3."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **{**shape, "vocab_size": vocab}, tie_word_embeddings=tied, dtype="float32"
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=3 / 16)  # a normalized row of 256 has a length of 16
        for layer in model.model.layers:  # a last row that is not its own token's embedding
            layer.mlp.down_proj.weight *= 50
    model.save_pretrained(directory)


def float64_scores(
    hidden: NDArray[np.float32], head: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return log-softmax in float64 at the targets, row by row."""
    from scipy.special import logsumexp

    logits = hidden.astype(np.float64) @ head.T
    own = logits[np.arange(len(targets)), targets]
    return np.asarray(own - logsumexp(logits, axis=1))


@pytest.fixture
def quantized_head(quantized_copy: Path) -> Path:
    """The tiny W4A16 checkpoint with its head quantized as well, as a careless recipe has it."""
    from safetensors.torch import load_file, save_file

    from tiny.quantizing import quantize_linear, scheme_of
    from tiny.recipes import Group

    tensors = load_file(quantized_copy / "model.safetensors")
    parts = quantize_linear(tensors.pop("lm_head.weight"), scheme_of(Group("W4A16")))
    tensors |= {f"lm_head.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, quantized_copy / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized_copy / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    config["quantization_config"]["config_groups"]["group_0"]["targets"] += ["re:.*lm_head"]
    (quantized_copy / "config.json").write_text(json.dumps(config))
    return quantized_copy


def test_a_quantized_head_is_refused_by_name_and_the_engine_lives_on(quantized_head: Path) -> None:
    from vllm import SamplingParams

    settings = EngineSettings(enforce_eager=True, max_model_len=256, kernels="portable")
    prompt = {"prompt_token_ids": [0, 7, 8, 9]}
    with running_engine(quantized_head, settings=settings, dtype="float32") as llm:
        for _ in range(2):
            (output,) = llm.generate([prompt], SamplingParams(score_mode=True), use_tqdm=False)
            assert len(output.prompt_logprobs) == 4
            for name in ("logprobs", "top1", "greedy"):
                with pytest.raises(
                    ValueError, match=r"a quantized head .* add lm_head to .* ignore"
                ):
                    getattr(output.prompt_logprobs, name)
            with pytest.raises(ValueError, match="a quantized head"):
                output.prompt_logprobs[1]
        generate = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([prompt], generate, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 2


def test_a_pooling_model_is_refused(root: Path) -> None:
    from vllm import SamplingParams

    model = root / "fixtures" / "tiny" / "llama"
    with engine(model, runner="pooling", convert="embed", skip_tokenizer_init=False) as llm:
        prompt = {"prompt_token_ids": [0, 7, 8, 9]}
        with pytest.raises(ValueError, match="score_mode=True needs a model that generates"):
            llm.llm_engine.add_request("x", prompt, SamplingParams(score_mode=True))
        with pytest.raises(ValueError, match=r"only supported for generative models|generat"):
            llm.generate([prompt], SamplingParams(score_mode=True), use_tqdm=False)
        assert len(llm.encode([prompt], pooling_task="embed", use_tqdm=False)) == 1


def test_an_error_that_is_kept_does_not_end_the_next_engine(root: Path) -> None:
    """The frames of an exception hold the engine; its end must not come in the middle of another's.

    A gate whose one check failed would otherwise lose the checks after it.
    """
    from vllm import SamplingParams

    model, prompt = root / "fixtures" / "tiny" / "llama", {"prompt_token_ids": [0, 7, 8]}
    with pytest.raises(RuntimeError, match="kept") as kept, engine(model) as llm:
        raise RuntimeError("kept")
    with engine(model) as llm:
        del kept
        gc.collect()
        (output,) = llm.generate([prompt], SamplingParams(score_mode=True), use_tqdm=False)
        assert len(output.prompt_logprobs.logprobs) == 2
