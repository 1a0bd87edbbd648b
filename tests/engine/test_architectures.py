"""Architectures: streamed as HF computes them, served as the reference says, or refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from architecture_runs import SETTINGS, Run, random_probe
from quantgate.errors import BadInput
from quantgate.judging.attribution import Suspects, attribute
from quantgate.judging.budget import FP32_MAX
from quantgate.judging.verdict import Verdict
from quantgate.measuring import empty_model, engine, reference
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.whole_model import difference_from_whole
from random_architectures import ARCHITECTURES
from random_models import make

PROBE = random_probe()


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small random model of an architecture, made once."""
    root = tmp_path_factory.mktemp("architectures")

    def find(name: str) -> Path:
        if not (root / name).exists():
            make(ARCHITECTURES[name], root / name)
        return root / name

    return find


# The reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_streamed_model_is_hfs_own(name: str, made: Callable[[str], Path]) -> None:
    """HF's `from_pretrained` and its eager attention, over every window that is judged."""
    directory = made(name)
    moved = difference_from_whole(directory, random_probe(ARCHITECTURES[name].task))
    assert moved is not None
    assert moved <= FP32_MAX


def test_a_reference_that_leaves_something_out_is_the_one_to_blame(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF's sdpa leaves Gemma 2's soft cap out: the engine, which has it, is right."""
    directory = made("gemma2")
    right = reference.measure(directory, PROBE, dtype="float32", announce=quiet)
    monkeypatch.setattr(empty_model, "_needs_eager_attention", lambda _: False)
    wrong = reference.measure(directory, PROBE, dtype="float32", announce=quiet)
    suspects = Suspects(
        engine=right,
        own=wrong,
        library=lambda: wrong,
        disagreement=lambda: ("none", 0.0),
        base=None,
        modules=pytest.fail,
        whole=lambda: difference_from_whole(directory, PROBE),
    )
    verdict = attribute(Verdict("fail", "they differ"), suspects)
    assert verdict.attribution is not None
    assert verdict.attribution.startswith("REFERENCE: on one window HF's own forward")


# The engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "opt", "falcon", "gpt-neox"])
def test_an_engine_agrees_and_a_scale_that_is_off_is_named(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Soft caps; learned positions and projections; qkv by group; vLLM's Transformers backend."""
    row = Run(name, "unquantized", made(name), "generate", tmp_path).row()
    assert row.fidelity.startswith("pass"), row
    assert row.replay.startswith("pass"), row
    assert row.fault.startswith("caught: "), row


def test_the_first_examples_of_score_mode_run_on_an_opt_model(made: Callable[[str], Path]) -> None:
    """As the documents of score mode's first draft have them, with both of its spellings."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    directory = made("opt")
    (window, *_) = PROBE.windows
    token_ids = list(window.ids)
    sampling_params = SamplingParams(score_mode=True, temperature=0.0)
    one = dataclasses.replace(PROBE, windows=(window,))
    expected = -reference.measure(directory, one, dtype="float32", announce=quiet).logprob.sum()
    with engine.running_engine(directory, settings=SETTINGS, dtype="float32") as llm:
        for more in ({}, {"target_token_ids": token_ids[1:]}):
            outputs = llm.generate(
                prompts=[TokensPrompt(prompt_token_ids=token_ids, **more)],
                sampling_params=sampling_params,
                use_tqdm=False,
            )
            output = outputs[0]
            total_nll = sum(
                -output.prompt_logprobs[i][token_ids[i]].logprob
                for i in range(1, len(token_ids))
                if token_ids[i] in output.prompt_logprobs[i]
            )
            assert total_nll == pytest.approx(float(expected), abs=1e-5 * len(token_ids))


# What cannot be ----------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def config_of(**values: Any) -> Edit:
    return lambda config, _: config.update(values)


def without_head(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


REFUSED: dict[str, tuple[Edit, str]] = {
    "an unknown architecture": (
        config_of(model_type="llama9", architectures=["Llama9ForCausalLM"]),
        "Llama9ForCausalLM",
    ),
    "an encoder with a decoder": (
        config_of(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "T5ForConditionalGeneration",
    ),
    "a head_dim that contradicts the tensors": (config_of(head_dim=64), "head_dim"),
    "a hidden size of another model": (config_of(hidden_size=256), "hidden_size"),
    "heads that do not divide the hidden size": (config_of(num_attention_heads=5), "config.json"),
    "a layer too many": (config_of(num_hidden_layers=4), "model.layers.3."),
    "a vocabulary of another model": (config_of(vocab_size=640), "vocab_size"),
    "a head that is said to be tied and is not": (
        config_of(tie_word_embeddings=True),
        "tie_word_embeddings",
    ),
    "no head": (without_head, "lm_head.weight"),
    "an activation that there is not": (config_of(hidden_act="gelu9"), "LlamaForCausalLM"),
    "a rope scaling that there is not": (
        config_of(rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}),
        "LlamaForCausalLM",
    ),
    "a size that is no number": (config_of(intermediate_size="wide"), "intermediate_size"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_itself_is_refused_in_a_sentence(
    what: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    edit, named = REFUSED[what]
    directory = tmp_path / "model"
    shutil.copytree(made("llama3"), directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    edit(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput) as caught:
        reference.measure(directory, PROBE, dtype="float32", announce=quiet)
    said = str(caught.value)
    assert said.startswith(f"{directory}: ")
    assert named in said
    assert said.endswith(".")
    assert "\n" not in said
    assert caught.value.__cause__ is None or str(caught.value.__cause__) not in said


def refusal_of(directory: Path) -> str:
    with (
        pytest.raises(EngineFailure) as caught,
        engine.running_engine(directory, settings=SETTINGS, dtype="float32"),
    ):
        pass
    return str(caught.value)


def test_an_architecture_that_vllm_lacks_is_named(made: Callable[[str], Path]) -> None:
    said = refusal_of(made("deberta-v2"))
    assert "has no DebertaV2ForTokenClassification (model_type 'deberta-v2')" in said
    assert "Supported architectures" not in said
