"""Models that vLLM serves as token classifiers: architectures, widths of heads, formats."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.judging.budget import FP32_MAX_RAW
from quantgate.measuring import reference, session
from quantgate.measuring.streamed_model import StreamedModel
from quantgate.measuring.whole_model import difference_from_whole
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe, embedded_probe, stored_probe
from quantgate.subject.task import EMBED, Task

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)
WIDTH, LAYERS = 128, 2
DECODER = {
    "vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
ENCODER = {**DECODER, "type_vocab_size": 2}
del ENCODER["num_key_value_heads"]


def quiet(_: str) -> None:
    pass


def saved(kind: str, config: dict[str, Any], labels: int, into: Path, root: Path) -> Path:
    """Write a random model with a head, in float32."""
    import torch
    import transformers

    torch.manual_seed(0)
    family = kind.partition("For")[0]
    settings = getattr(transformers, f"{family}Config")(
        **config, num_labels=labels, pad_token_id=2, initializer_range=0.1
    )
    model = getattr(transformers, kind)(settings)
    for head in ("score", "classifier"):
        if (bias := getattr(getattr(model, head, None), "bias", None)) is not None:
            torch.nn.init.normal_(bias)
    model.save_pretrained(into)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(root / "fixtures" / "tiny" / "llama" / name, into / name)
    return into


def short(root: Path, task: Task) -> Probe:
    probe = embedded_probe(root, task)
    return dataclasses.replace(probe, windows=probe.windows[:6])


def largest_error(directory: Path, probe: Probe) -> float:
    served, _ = session.measure(
        directory, probe, settings=SETTINGS, dtype="float32", announce=quiet
    )
    expected = reference.measure(directory, probe, dtype="float32", announce=quiet)
    assert served.values.shape == expected.values.shape
    assert np.abs(served.values).max() > 0.1
    return float(np.abs(served.values - expected.values).max())


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("Qwen2ForTokenClassification", 1),
        ("LlamaForTokenClassification", 5),
        ("Qwen3ForTokenClassification", 7),
        ("MistralForTokenClassification", 2),
        ("BertForTokenClassification", 5),
        ("RobertaForTokenClassification", 7),
    ],
)
def test_token_classifiers_are_served_as_hf_computes_them(
    root: Path, tmp_path: Path, kind: str, labels: int
) -> None:
    config = ENCODER if kind.startswith(("Bert", "Roberta")) else DECODER
    directory = saved(kind, config, labels, tmp_path, root)
    assert largest_error(directory, short(root, "token_classify")) <= FP32_MAX_RAW


@pytest.mark.parametrize("labels", [1, 2, 5, 7])
def test_a_head_of_any_width_stays_whole_in_a_quantized_model(
    root: Path, tmp_path: Path, labels: int
) -> None:
    """W4A16 has groups of 128: neither 1, 2, 5 nor 7 labels could be packed so."""
    from tiny.quantizing import build
    from tiny.recipes import Group, Recipe

    base = saved("LlamaForTokenClassification", DECODER, labels, tmp_path / "base", root)
    recipe = Recipe((Group("W4A16"),), ignore=("score",))
    build(base, tmp_path / "quantized", recipe)
    assert largest_error(tmp_path / "quantized", short(root, "token_classify")) <= FP32_MAX_RAW


def test_last_hidden_states_are_normed(root: Path) -> None:
    """`--convert embed` gives what HF calls `hidden_states[-1]`: behind the final norm."""
    import torch
    from transformers import AutoModelForCausalLM

    directory, probe = root / "fixtures" / "tiny" / "llama", short(root, EMBED)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    served, _ = session.measure(
        directory, probe, settings=SETTINGS, dtype="float32", announce=quiet
    )
    rows = []
    with torch.inference_mode():
        for window in probe.windows:
            output = model(torch.tensor([window.ids]), output_hidden_states=True)
            rows.append(output.hidden_states[-1][0].numpy())
    np.testing.assert_allclose(served.values, np.concatenate(rows), atol=FP32_MAX_RAW, rtol=0)


@pytest.mark.parametrize("name", ["prm-native", "colbert-bert"])
def test_our_own_modules_load_what_was_trained(root: Path, name: str) -> None:
    """The classes that transformers lacks: no tensor is missing, and none is left over."""
    from safetensors.torch import load_file

    from quantgate.measuring.heads import head_classes

    directory = root / "fixtures" / "tiny" / name
    config = json.loads((directory / "config.json").read_text())
    kind = head_classes()[config["architectures"][0]]
    model = StreamedModel(
        directory, "float32", task=EMBED if name == "colbert-bert" else "token_reward"
    ).model
    assert isinstance(model, kind)
    stored = load_file(directory / "model.safetensors")
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: t.shape for n, t in stored.items()
    }


@pytest.mark.parametrize(
    "name",
    ["ner-bert", "ner-qwen2", "prm-native", "prm-qwen2", "reward-qwen2", "colbert-bert"],
)
def test_the_streamed_model_is_the_whole_one_for_every_head(root: Path, name: str) -> None:
    """What attribution asks when a replay fails: one row for a reward, one for each token else."""
    files = read_checkpoint_files(root).values()
    one = next(file for file in files if file.base == f"./fixtures/tiny/{name}")
    moved = difference_from_whole(root / "fixtures" / "tiny" / name, stored_probe(one))
    assert moved is not None
    assert moved < FP32_MAX_RAW


def test_a_bare_body_embeds_by_its_last_hidden_states(root: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 and its like: a BertModel without any head."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    probe = embedded_probe(root, "token_embed")
    probe = dataclasses.replace(probe, windows=probe.windows[:4])
    found = reference.measure(tmp_path, probe, dtype="float32", announce=lambda _: None)
    with torch.inference_mode():
        own = [model(torch.tensor([w.ids])).last_hidden_state[0] for w in probe.windows]
    assert np.abs(found.values - torch.cat(own).numpy()).max() < 1e-5
