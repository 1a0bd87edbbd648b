"""Faults of models that pool, each injected into a real engine or checkpoint, and each found."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantgate.errors import BadInput
from quantgate.judging import compare, drift, fidelity, invariance, pooled, task_quality
from quantgate.judging.golden import from_json, golden_path
from quantgate.judging.verdict import Verdict
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_file, verify
from quantgate.subject.files import identity
from quantgate.subject.probe import Probe, probe_for, stored_probe

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)


def quiet(_: str) -> None:
    pass


def few(checkpoint: Checkpoint, quality: bool) -> Probe:
    """The embedded probe's first windows: enough for what is tested, and faster."""
    whole = stored_probe(checkpoint, quality)
    return dataclasses.replace(whole, windows=whole.windows[: 64 if quality else 32])


@pytest.fixture
def lab() -> Lab:
    """Lab of a fault's own: nothing that was measured before it."""
    return Lab(few, Ledger(quiet))


def case(checkpoint: Checkpoint, lab: Lab, dtype: str = "serving") -> Case:
    return Case.of(checkpoint, dtype, lab)


def embedded(name: str, source: Path | None = None) -> Checkpoint:
    """An embedded checkpoint, or another directory in its place."""
    known = read_checkpoint_file(ROOT / "fixtures" / "checkpoints" / f"{name}.toml", ROOT)
    return dataclasses.replace(known, source=str(source or known.source), revision=None)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """Copies of embedded checkpoints, to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(ROOT / "build" / name, tmp_path / name))

    return copy


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def assert_fails(verdict: Verdict, *words: str) -> None:
    message = verdict.message("it")
    assert verdict.outcome == "fail", message
    assert [word for word in words if word not in message] == [], message


# Heads -------------------------------------------------------------------------------------------


def quantize_head(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors.pop("score.weight").float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    tensors["score.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors["score.weight_scale"] = scale.to(torch.bfloat16)


def test_a_quantized_head_is_refused_by_name(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("tiny-ner-qwen2-fp8-dynamic")
    change_tensors(directory, quantize_head)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    change_config(directory, quantization_config={**config, "ignore": []})
    with pytest.raises(BadInput, match=r"its head, 'score', is quantized.*`ignore`\.$"):
        verify(embedded("tiny-ner-qwen2-fp8-dynamic", directory))


def test_a_head_without_its_bias_is_found(copy_of: Callable[[str], Path], lab: Lab) -> None:
    directory = copy_of("tiny-ner-qwen2-w4a16")
    change_tensors(directory, lambda tensors: tensors.pop("score.bias"))
    verdict = pooled.head(case(embedded("tiny-ner-qwen2-w4a16", directory), lab))
    assert_fails(verdict, "score.bias is missing")


def test_swapped_labels_are_found(copy_of: Callable[[str], Path], lab: Lab) -> None:
    """No logit is another one: the entities are, and the names."""
    directory = copy_of("tiny-ner-bert-w4a16")
    labels = json.loads((directory / "config.json").read_text())["id2label"]
    labels["1"], labels["3"] = labels["3"], labels["1"]
    change_config(directory, id2label=labels, label2id={v: int(k) for k, v in labels.items()})
    checkpoint = embedded("tiny-ner-bert-w4a16", directory)
    assert_fails(pooled.head(case(checkpoint, lab)), "label 1 is PLACE, the base's is PERSON")
    assert_fails(task_quality.quality(case(checkpoint, lab)), "entity F1")
    assert fidelity.free_running(case(checkpoint, lab, "float32")).outcome == "pass"


def test_the_embedded_head_is_the_bases(lab: Lab) -> None:
    """What the two tests above break holds before."""
    verdict = pooled.head(case(embedded("tiny-prm-native-w4a16"), lab))
    assert verdict.repaired == ("score.0", "score.2")  # vLLM gives them no name
    assert verdict.outcome == "pass"


# Activations, steps, embeddings ------------------------------------------------------------------


def test_a_softmax_that_is_none_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.pooler import activations

    monkeypatch.setattr(activations.PoolerClassify, "forward_chunk", lambda _, data: data)
    verdict = pooled.activation(case(embedded("tiny-ner-bert-w4a16"), lab))
    assert_fails(verdict, "config.json says softmax", "sum of probabilities")


def test_another_activation_than_the_configs_is_found(
    copy_of: Callable[[str], Path], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regression's reward has none; here vLLM is made to forget that."""
    from vllm.model_executor.layers.pooler import activations

    directory = copy_of("tiny-reward-qwen2-w4a16")
    change_config(directory, problem_type="regression")
    checkpoint = embedded("tiny-reward-qwen2-w4a16", directory)
    assert pooled.activation(case(checkpoint, Lab(few, Ledger(quiet)))).outcome == "pass"
    monkeypatch.setattr(activations.PoolerIdentity, "forward_chunk", lambda _, data: data.sigmoid())
    assert_fails(pooled.activation(case(checkpoint, lab)), "config.json says none")


def test_an_embedding_that_is_not_normalized_is_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.pooler import activations

    monkeypatch.setattr(activations.PoolerNormalize, "forward_chunk", lambda _, data: data)
    checkpoint = embedded("tiny-colbert-bert-w8a8")
    assert_fails(pooled.activation(case(checkpoint, lab)), "max |norm - 1|")
    assert_fails(pooled.late_interaction(case(checkpoint, lab)), "LLM.score is not max-sim")


@pytest.mark.parametrize("name", ["tiny-prm-qwen2-w4a16", "tiny-prm-native-fp8-dynamic"])
def test_a_step_tag_that_is_off_by_one_is_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from vllm.v1.pool.metadata import PoolingMetadata

    honest = PoolingMetadata.get_prompt_token_ids_cpu
    monkeypatch.setattr(
        PoolingMetadata,
        "get_prompt_token_ids_cpu",
        lambda metadata: [ids.roll(-1) for ids in honest(metadata)],
    )
    verdict = pooled.step_rows(case(embedded(name), lab))
    assert_fails(verdict, "steps are not the rows of their tags", "the engine's tag")


def test_a_step_tag_that_no_text_has_is_not_a_pass(lab: Lab) -> None:
    wrong = dataclasses.replace(embedded("tiny-prm-qwen2-w4a16"), step_tag_id=1000)
    verdict = pooled.step_rows(case(wrong, lab))
    assert verdict.outcome == "not-run"
    assert "is the step tag 1000" in verdict.detail


def test_parameters_that_leak_to_another_request_are_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request of a batch decides for all whether they are activated."""
    from vllm.model_executor.layers.pooler.tokwise.heads import TokenClassifierPoolerHead

    honest = TokenClassifierPoolerHead.forward_chunk
    first: list[Any] = []

    def leaky(head: Any, data: Any, params: Any) -> Any:
        first.append(params)
        return honest(head, data, first[0])

    monkeypatch.setattr(TokenClassifierPoolerHead, "forward_chunk", leaky)
    assert_fails(pooled.activation(case(embedded("tiny-prm-qwen2-w4a16"), lab)), "softmax")


def test_an_answer_that_depends_on_the_batch_is_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one request in ten thousand parts of another's."""
    from vllm.model_executor.layers.pooler.tokwise.methods import AllPool

    honest = AllPool.forward

    def mixed(pool: Any, hidden: Any, metadata: Any) -> Any:
        found = honest(pool, hidden, metadata)
        means = [rows.mean(dim=0) for rows in found if rows is not None]
        return [None if rows is None else rows + 1e-4 * sum(means) for rows in found]

    monkeypatch.setattr(AllPool, "forward", mixed)
    verdict = invariance.served_otherwise(case(embedded("tiny-ner-qwen2-w4a16"), lab, "float32"))
    assert_fails(verdict, "what is served depends on how it is served")


# Weights and tokenizers --------------------------------------------------------------------------


def stretch_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight_scale"] *= 1.05


@pytest.mark.parametrize("format_name", ["w4a16", "w8a8", "fp8-dynamic"])
def test_a_scale_that_is_a_twentieth_too_large_is_found(
    copy_of: Callable[[str], Path], lab: Lab, format_name: str
) -> None:
    """In the checkpoint, by its golden; the reference has the same weights, and agrees."""
    name = f"tiny-ner-qwen2-{format_name}"
    directory = copy_of(name)
    change_tensors(directory, stretch_a_layer)
    checkpoint = embedded(name, directory)
    whole = Lab(stored_probe, Ledger(quiet))
    ours = case(checkpoint, whole, "float32")
    probe = ours.probe
    path = golden_path(ROOT, name, "drift-float32", "cpu")
    golden = from_json(path.read_text(), probe, path).measurement
    measured = ours.engine
    if format_name == "w4a16":
        verdict = compare.drift_exact(
            measured, golden, probe, exact=lambda: golden, reference=lambda: golden
        )
    else:
        verdict = drift.against(ours, measured, golden)
    assert_fails(verdict, "|Δ logit|", "by label")
    assert fidelity.free_running(ours).outcome == "pass"


def test_a_scale_that_vllm_loads_wrong_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine alone: free-running fidelity and replay both see it."""
    import vllm.model_executor.kernels.linear  # noqa: F401  first: it brings the emulated ones

    from quantgate.patches import emulated_kernels

    honest = emulated_kernels.dequantize_groups
    calls = iter(range(1000))

    def faulty(code: Any, scale: Any, offset: Any) -> torch.Tensor:
        # Four a layer, in order: the third layer's down_proj.
        return honest(code, scale * 1.05 if next(calls) == 11 else scale, offset)

    monkeypatch.setattr(emulated_kernels, "dequantize_groups", faulty)
    checkpoint = embedded("tiny-prm-qwen2-w4a16")
    assert_fails(
        fidelity.free_running(case(checkpoint, lab, "float32")), "ENGINE", "layers.2.mlp.down_proj"
    )
    assert_fails(fidelity.replay(case(checkpoint, lab, "float32")), "layers.2.mlp.down_proj")


def test_a_second_bos_is_refused(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("tiny-ner-qwen2-w4a16")
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    template = tokenizer["post_processor"]["single"]
    tokenizer["post_processor"]["single"] = [template[0], *template]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match=r"its tokenizer adds '<\|bos\|>' twice at the start"):
        probe_for(few(embedded("tiny-ner-qwen2-w4a16"), quality=False), directory)


def test_what_is_not_finite_fails(copy_of: Callable[[str], Path], lab: Lab) -> None:
    directory = copy_of("tiny-reward-qwen2-w4a16")
    change_tensors(directory, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    checkpoint = embedded("tiny-reward-qwen2-w4a16", directory)
    assert_fails(task_quality.quality(case(checkpoint, lab)), "logits are not finite")
    assert_fails(fidelity.free_running(case(checkpoint, lab)), "CHECKPOINT", "non-finite logits")
    assert_fails(invariance.served_otherwise(case(checkpoint, lab, "float32")), "nan")


def test_labels_that_the_probe_does_not_know_are_compared_with_the_bases() -> None:
    def unlabelled(checkpoint: Checkpoint, quality: bool) -> Probe:
        probe = few(checkpoint, quality)
        windows = tuple(dataclasses.replace(window, labels=()) for window in probe.windows)
        return dataclasses.replace(probe, windows=windows)

    verdict = task_quality.quality(
        case(embedded("tiny-ner-bert-w4a16"), Lab(unlabelled, Ledger(quiet)))
    )
    assert "agreement with the base 1.0000 → 0.99" in verdict.detail
    assert "the probe does not know its labels" in verdict.detail


def test_the_embedded_checkpoints_are_the_pinned_ones() -> None:
    for path in sorted((ROOT / "fixtures" / "checkpoints").glob("tiny-*.toml")):
        checkpoint = read_checkpoint_file(path, ROOT)
        assert checkpoint.revision == f"sha256:{identity(checkpoint.directory)}", path.stem
