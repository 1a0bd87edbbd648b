"""lm-evaluation-harness with our model gives what it gives with its own `hf` backend."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import BadInput
from quantgate.subject.probe import Probe

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness: make env, or pip install -e '.[lm-eval]'"
)

pytestmark = pytest.mark.long

# The most tokens that both feed the model: less than a document has.
MAX_LENGTH = 64
LOGPROB = 1e-4

TASKS: dict[str, dict[str, Any]] = {
    # Choices of several tokens, after a common context.
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    # Choices of one token, which are scored together.
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": ["a", "e", "the", " "],
        "doc_to_target": 0,
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    },
    # One continuation, which is the greedy one or not.
    "greedy": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    # Without a context.
    "empty": {
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "beginning",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "document",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}

Evaluate = Callable[[str], dict[str, Any]]


def _documents(probe: Probe) -> list[dict[str, Any]]:
    """Real continuations of the probe's texts, beside those of other texts.

    No context ends where a text without context ends: lm-eval 0.4.13's `hf` would take the logits
    of one for the other.
    """
    texts = [window.text for window in probe.windows[:8]]
    contexts = [text[:60].rstrip() for text in texts]
    ends = [text[len(c) : len(c) + 15] for text, c in zip(texts, contexts, strict=True)]
    return [
        {
            "context": context,
            "continuation": ends[place][:3],
            "choices": [ends[place], ends[place - 1], ends[place - 2], ends[place][:6]],
            "answer": 0,
            "beginning": context[:40],
            "document": texts[place],
        }
        for place, context in enumerate(contexts)
    ]


@pytest.fixture(scope="module")
def tasks(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks on local data."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(document) + "\n" for document in _documents(probe))
    (folder / "data.jsonl").write_text(lines)
    for name, task in TASKS.items():
        common: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
            "test_split": "test",
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **task}))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def evaluate(root: Path, tasks: Path) -> Evaluate:
    """Evaluate the tiny model in float32 by one of lm-eval's models."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import quantgate.lm_eval  # noqa: F401  registers the model

    def run(model: str) -> dict[str, Any]:
        more = {"enforce_eager": True} if model == "quantgate" else {}
        found: dict[str, Any] = simple_evaluate(
            model=model,
            model_args={
                "pretrained": str(root / "fixtures/tiny/llama"),
                "dtype": "float32",
                "max_length": MAX_LENGTH,
                **more,
            },
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
        )
        return found

    return run


@pytest.fixture(scope="module")
def ours(evaluate: Evaluate) -> dict[str, Any]:
    return evaluate("quantgate")


@pytest.fixture(scope="module")
def theirs(evaluate: Evaluate) -> dict[str, Any]:
    return evaluate("hf")


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_that_of_hf(
    task: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pairs = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
    assert len(pairs) == 8
    for left, right in pairs:
        answers, expected = left["resps"], right["resps"]
        if task == "generation":
            assert answers == expected
            continue
        for (one,), (other,) in zip(answers, expected, strict=True):
            value, wanted = (one, other) if task == "rolling" else (one[0], other[0])
            assert value == pytest.approx(wanted, abs=LOGPROB)
            assert task == "rolling" or one[1] == other[1]


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_is_that_of_hf(
    task: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    found, expected = (
        {name: value for name, value in one["results"][task].items() if "," in name}
        for one in (ours, theirs)
    )
    assert found == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for name, value in expected.items()
    }


def test_the_cases_are_of_every_kind(probe: Probe, theirs: dict[str, Any]) -> None:
    """Greedy and not, right and wrong, documents longer than the model is fed."""
    greedy = {answer[0][1] for sample in theirs["samples"]["greedy"] for answer in sample["resps"]}
    assert greedy == {True, False}
    assert 0 < theirs["results"]["choices"]["acc,none"] < 1
    assert all(len(window.ids) > MAX_LENGTH for window in probe.windows[:8])


def test_results_say_which_kernels_gave_them(ours: dict[str, Any]) -> None:
    info = ours["config"]["quantgate"]
    assert info["kernels"]["self_attn.qkv_proj"]
    assert info["versions"]["vllm"]


def test_choices_of_one_token_are_one_request() -> None:
    from quantgate.lm_eval.model import Continuation, prompts_for

    context = (1, 2, 3)
    asked = [Continuation(context, (token,)) for token in (7, 8, 7)]
    asked += [Continuation(context, (7, 8)), Continuation((1, 2, 3, 7), (8,))]
    prompts = prompts_for(asked, 100)
    assert [(p.ids, p.start, p.targets, p.asked_by) for p in prompts] == [
        ((1, 2, 3, 7), 2, [7, 8, 7], [0, 1, 2]),
        ((1, 2, 3, 7, 8), 2, None, [3]),
        ((1, 2, 3, 7, 8), 3, [8], [4]),
    ]
    (cut,) = prompts_for([Continuation((1, 2, 3), (4, 5))], 3)
    assert (cut.ids, cut.start) == ((3, 4, 5), 0)


def test_a_continuation_that_does_not_fit_is_refused() -> None:
    from quantgate.lm_eval.model import Continuation, prompts_for

    with pytest.raises(BadInput, match="of 4 tokens cannot be scored with max_length=3"):
        prompts_for([Continuation((0,), (1, 2, 3, 4))], 4)
    assert prompts_for([Continuation((0,), ())], 4) == []


@pytest.mark.slow(reason="lm-eval looks through all its tasks; another engine")
def test_the_documented_command_runs(
    root: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a local task, in this process, as `python -m quantgate.lm_eval` runs it."""
    from quantgate.lm_eval.__main__ import main

    document = (root / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    python -m quantgate.lm_eval (.*)$", document, re.MULTILINE)
    words = shlex.split(command.replace("arc_easy", "choices"))
    monkeypatch.setattr("sys.argv", ["lm_eval", *words, "--include_path", str(tasks)])
    monkeypatch.chdir(root)
    assert main() == 0
    assert "|choices|" in capsys.readouterr().out


@pytest.mark.slow(reason="lm-eval looks through all its tasks; another engine")
def test_the_documented_python_runs(
    root: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (root / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    monkeypatch.chdir(root)
    found: dict[str, Any] = {}
    exec(block.replace('"arc_easy"', f'"{tasks / "choices.yaml"}"'), found)
    assert "acc,none" in next(iter(found["results"]["results"].values()))


def test_what_the_user_can_mend_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantgate.lm_eval import QuantgateLM, __main__

    def command() -> None:
        QuantgateLM(pretrained="/no/where")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", command)
    assert __main__.main() == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: /no/where: no tokenizer to be had")
    with pytest.raises(BadInput, match="trust_remote_code is not supported"):
        QuantgateLM(pretrained="/no/where", trust_remote_code=True)
    monkeypatch.setattr(__main__, "find_spec", lambda _: None)
    assert __main__.main() == 4
    assert 'pip install "quantgate[lm-eval]"' in capsys.readouterr().err
