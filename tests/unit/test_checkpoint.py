"""Checkpoint files and directories: what is read, and the sentence that bad input gets."""

import sys
from pathlib import Path

import pytest

from quantgate.errors import BadInput
from quantgate.subject import checkpoint as ck
from quantgate.subject import checkpoint_file, files, processor
from quantgate.subject.checkpoint import Checkpoint, KnownFailure

GOOD = 'source = "./build/x"\nscheme = "W4A16"\nbase = "./base"\n'


def write(root: Path, text: str, name: str = "x") -> Path:
    path = root / "fixtures" / "checkpoints" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    text = GOOD + (
        '[engine]\nmax_model_len = 512\nkernels = "portable"\n'
        '[budget.quality]\nmargin = 0.05\nreason = "small model"\n'
    )
    found = checkpoint_file.read_checkpoint_file(write(tmp_path, text), tmp_path)
    assert found.id == "x"
    assert found.engine == ck.EngineSettings(max_model_len=512, kernels="portable")
    assert found.budget["quality"] == ck.BudgetOverride(0.05, "small model")
    assert found.base_checkpoint is not None
    assert found.base_checkpoint.engine == found.engine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "[engine]\nmax_modle_len = 1", "in [engine]; did you mean 'max_model_len'?"),
        (GOOD + "shceme = 1", "unknown key 'shceme'; did you mean 'scheme'?"),
        (GOOD + "[budget.quality]\nmargn = 1", "in [budget.quality]; did you mean 'margin'?"),
        (
            GOOD + "[budget.qualty]\nmargin = 1\nreason = 'r'",
            "unknown table [budget.qualty]; did you mean 'quality'?",
        ),
        (
            GOOD + "[budget.drift]\nmargin = 1\nreason = ' '",
            "the reason in [budget.drift] is empty",
        ),
        (GOOD + 'invariance = ["tp"]', "tp"),
        (GOOD + "[budget.quality]\nmargin = 1.0", "missing required field `reason`"),
        (GOOD + "[engine]\nmax_model_len = 'long'", "got `str` - at `$.engine.max_model_len`"),
        (GOOD + "[engine]\nkernels = 'fast'", "Invalid enum value 'fast' - at `$.engine.kernels`"),
        (GOOD + "revision = 'main'", "revision 'main' is not pinned"),
        ("source = './x'", "the key 'scheme' is missing"),
        ("source = ", "not a TOML file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_key_and_the_remedy(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as error:
        checkpoint_file.read_checkpoint_file(path, tmp_path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_name_that_is_no_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the name must match"):
        checkpoint_file.read_checkpoint_file(write(tmp_path, GOOD, "Llama_W4"), tmp_path)


def test_a_checkpoint_that_is_neither_id_nor_path_names_the_nearest(tmp_path: Path) -> None:
    known = {"tiny-llama": ck.Checkpoint("tiny-llama", "./x")}
    with pytest.raises(BadInput, match="nearest: tiny-llama"):
        checkpoint_file.find_checkpoint("tiny-lama", known, tmp_path, None)


def test_a_directory_is_a_checkpoint_without_a_golden(tmp_path: Path) -> None:
    (tmp_path / "My Model").mkdir()
    found = checkpoint_file.find_checkpoint(str(tmp_path / "My Model"), {}, tmp_path, str(tmp_path))
    assert (found.id, found.golden) == ("my-model", False)
    assert found.base == str(tmp_path)
    assert found.directory == tmp_path / "My Model"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('task = "tokens"', "Invalid enum value 'tokens'"),
        ("step_tag_id = 7", "step_tag_id is for task 'token_reward', but task is 'generate'"),
        ('task = "token_reward"\nstep_tag_id = "\\n"', "Expected `int"),
    ],
)
def test_a_task_that_is_none_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        checkpoint_file.read_checkpoint_file(write(tmp_path, f"{GOOD}{line}\n"), tmp_path)


def test_a_classifier_of_texts_is_not_a_reward(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}'
    )
    with pytest.raises(BadInput, match="a sequence classifier with 2 labels; only reward models"):
        files.refuse_another_task(tmp_path, "sequence_reward")


def test_what_a_processor_cannot_do_excuses_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "is_x86_without_vnni", lambda: True)
    of_processor = KnownFailure("quality", "saturates", "docs", when="x86-without-vnni")
    everywhere = KnownFailure("drift-float32", "moved", "docs")
    checkpoint = Checkpoint("x", "./x", known_failure=(of_processor, everywhere))
    of_cpu, of_gpu = ["CPUInt8ScaledMMLinearKernel"], ["CutlassInt8ScaledMMLinearKernel"]
    assert checkpoint.known_failure_of("quality", of_cpu) is of_processor
    assert checkpoint.known_failure_of("quality", of_gpu) is None
    assert checkpoint.known_failure_of("drift-float32", of_gpu) is everywhere


def test_a_known_failure_may_depend_on_the_kernel() -> None:
    known = KnownFailure("audit-loaded", "truncates", "docs", when="cutlass-int8")
    assert known.applies(["FlashAttentionImpl", "CutlassInt8ScaledMMLinearKernel"])
    assert not known.applies(["CutlassFP8ScaledMMLinearKernel"])


@pytest.mark.parametrize(
    ("source", "pools"), [("from .tokwise import AllPool\n", False), ("", True)]
)
def test_whether_a_vllm_pools_steps_is_read_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, pools: bool
) -> None:
    pooler = tmp_path / "vllm" / "model_executor" / "layers" / "pooler"
    pooler.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    (pooler / "special.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert processor.has_step_pooling() == pools
