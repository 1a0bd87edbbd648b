"""The documented commands run, and print what the documents say."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from harness import ENGINE_ENVIRONMENT
from preloaded import run_python

from quantgate.judging.checks import CHECKS


def test_its_options_exist(readme: str, root: Path) -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], cwd=root, capture_output=True, text=True
    ).stdout
    for tool in ("regen_golden", "perplexity", "token_classification"):
        helped += subprocess.run(
            [sys.executable, f"tools/{tool}.py", "--help"], cwd=root, capture_output=True, text=True
        ).stdout
    for verb in ("audit", "kld"):
        helped += subprocess.run(
            [sys.executable, "-m", "quantgate", verb, "--help"],
            cwd=root,
            capture_output=True,
            text=True,
        ).stdout
    readme = re.sub(
        r"^    (python -m quantgate.lm_eval|pip install) .*$", "", readme, flags=re.MULTILINE
    )
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme))
    assert options
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", helped))
    assert options - known == set()


@pytest.mark.parametrize(
    ("document", "answer"),
    [
        ("README.md", r"^\d+\.\d+ nat per token$"),
        ("docs/pooling.md", r"^\(20, 6\)$"),
    ],
)
@pytest.mark.slow(reason="an engine that vLLM compiles, as by default")
def test_the_python_runs(root: Path, document: str, answer: str) -> None:
    text = (root / document).read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    result = run_python("-c", block, cwd=root, env=ENGINE_ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(answer, result.stdout, re.MULTILINE), result.stdout


def test_the_budgets_are_what_the_command_prints(root: Path) -> None:
    text = (root / "docs" / "budgets.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-m", "quantgate", "budgets"], cwd=root, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, printed)


def test_every_check_is_listed_with_its_question() -> None:
    command = [sys.executable, "-m", "quantgate", "checks"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert [name for line in lines if line[0] != " " for name in line.split(", ")] == [
        name for check in CHECKS for name in check.names
    ]
    assert "  do two ranks give what one gives? (needs tensor-parallel)" in lines


def test_an_override_is_printed_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "fixtures" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "x.toml").write_text(
        'source = "./x"\nscheme = "W4A16"\n[budget.quality]\nmargin = 0.05\nreason = "[b]small"\n'
    )
    command = [sys.executable, "-m", "quantgate", "budgets", "--project", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert re.search(r"^x +quality +0\.05 nat/token +\[b\]small$", result.stdout, re.MULTILINE)
    (folder / "x.toml").write_text("source = 1")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 4
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


DOCUMENTS = [path.stem for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tools_that_documents_name_take_their_options(root: Path, document: str) -> None:
    text = (root / "docs" / f"{document}.md").read_text(encoding="utf-8")
    for command in re.findall(r"^ {4,}python3? (tools/\w+\.py.*)$", text, re.MULTILINE):
        # What stands after "--" is another command's.
        script, *arguments = shlex.split(command.partition(" -- ")[0])
        helped = subprocess.run(
            [sys.executable, script, "--help"], cwd=root, capture_output=True, text=True
        )
        assert helped.returncode == 0, command
        options = [argument for argument in arguments if argument.startswith("--")]
        assert [option for option in options if option not in helped.stdout] == [], command


def test_the_github_actions_example_gives_commands_that_exist(root: Path, readme: str) -> None:
    """Each of its steps is the README's, or asks for options and extras that there are."""
    workflow = yaml.safe_load((root / "docs/examples/github-actions.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"]
             if "run" in step]  # fmt: skip
    made = [step for step in steps if step.startswith("make ")]
    assert made == re.findall(r"^    (make \w+)$", readme, re.MULTILINE)
    helped = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], cwd=root, capture_output=True, text=True
    ).stdout
    for step in steps:
        if "pytest" in step:
            for option in re.findall(r"(?<!\S)--[a-z-]+", step):
                assert f"{option}" in helped, step
            assert f"pytest {step.split('pytest ')[1].split()[0]}" in readme, step
        if "quantgate" in step and "-m" in step:
            command = step.split("quantgate ")[1]
            known = subprocess.run(
                [sys.executable, "-m", "quantgate", command, "--help"], capture_output=True
            )
            assert known.returncode == 0, step
        if "pip install" in step:
            extra = re.findall(r"\[(\w+)\]", step)
            project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
            assert set(extra) <= set(project["optional-dependencies"])
    assert sum('cat report/gate.md >> "$GITHUB_STEP_SUMMARY"' in step for step in steps) == 2


def test_the_gate_in_one_line_is_pytests(root: Path) -> None:
    """Its status too: bad input is 4, and so is a directory that is not there."""
    command = [sys.executable, "-m", "quantgate", "gate"]
    for arguments, message in (
        (["tiny-lama"], "tiny-lama: neither a directory, nor a hub id"),
        (["tiny-llama-w4a16", "--base", "x/y"], "says what tiny-llama-w4a16's base is"),
        (["tiny-llama-w4a16", "--project", "/nowhere"], "/nowhere: no such directory"),
    ):
        result = subprocess.run([*command, *arguments], cwd=root, capture_output=True, text=True)
        assert result.returncode == 4, result.stdout
        assert message in result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
    listed = subprocess.run(
        [*command, "tiny-llama-w4a16", "--", "--co", "-q", "-k", "quality"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert listed.returncode == 0
    assert "test_quality[tiny-llama-w4a16-cpu]" in listed.stdout


def test_the_commands_for_a_real_checkpoint_are_accepted(root: Path, project: Path) -> None:
    """Each of them, of an embedded checkpoint in place of the one from the hub."""
    text = (root / "docs" / "adding-a-checkpoint.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ {4,}((?:pytest|quantgate) .*)$", text, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command.replace("llama-3.1-8b-instruct-w4a16", "tiny-llama-w4a16"))
        if words[0] == "pytest":
            # No GPU here: -m gpu is refused in a sentence, so that the rest of it is looked at.
            words = [word for word in words if word not in ("-m", "gpu")]
            asked = [sys.executable, "-m", "pytest", "suites", "--co", "-q", *words[1:]]
            asked = [word for word in asked if word not in ("-n", "4")]
        else:
            asked = [sys.executable, "-m", *words]
            asked += ["--", "--co", "-q"] if words[1] == "gate" else ["--help"]
        result = subprocess.run(asked, cwd=project, capture_output=True, text=True)
        assert result.returncode == 0, (command, result.stdout, result.stderr)


def test_the_perplexity_commands_are_accepted(
    readme: str, root: Path, tool: Callable[[str], ModuleType]
) -> None:
    text = readme + (root / "docs" / "score-mode.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python tools/perplexity.py (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        arguments = tool("perplexity").parse_arguments(shlex.split(command))
        assert (root / arguments.model).is_dir()


@pytest.mark.slow(reason="starts an engine for each of six commands")
def test_the_commands_on_any_text_run(root: Path, tmp_path: Path) -> None:
    """Every command of docs/kld.md, in its order; eagerly, because compiling takes minutes."""
    for name in ("build", "fixtures"):
        (tmp_path / name).symlink_to(root / name)
    lines = (root / "fixtures" / "probes" / "tiny.jsonl").read_text().splitlines()[1:9]
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    (tmp_path / "corpus.txt").write_text(text)
    document = (root / "docs" / "kld.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    quantgate (.*)$", document, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["kld", "ppl", "score", *["kld"] * 3]
    for command in commands:
        words = [*shlex.split(command), "--enforce-eager"]
        result = run_python("-m", "quantgate", *words, cwd=tmp_path)
        assert result.returncode == 0, (command, result.stderr[-2000:])
        answer = {"kld": "Mean KLD", "ppl": "perplexity ", "score": '"rank": '}[words[0]]
        assert answer in result.stdout, command
    assert (tmp_path / "base-states" / "states.json").is_file()
    assert json.loads((tmp_path / "figures.json").read_text())["text"]["source"] == "probe 'tiny'"


@pytest.mark.slow(reason="an engine that vLLM compiles, as for any checkpoint without a file")
def test_the_commands_for_a_model_card_run(root: Path, quantized: Path, tmp_path: Path) -> None:
    """With a base that is in the hub's cache, and of all checks the one that a card needs."""
    document = (root / "docs" / "model-card.md").read_text(encoding="utf-8")
    gate, card = re.findall(r"^    quantgate (.*)$", document, re.MULTILINE)
    (tmp_path / "Tiny-Llama-W4A16").symlink_to(quantized)
    cached = tmp_path / "hub" / "models--org--Tiny-Llama"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(root / "fixtures" / "tiny" / "llama", cached / "snapshots" / ("0" * 40))
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for command in (f"{gate} -- -k quality", card):
        words = ["-m", "quantgate", *shlex.split(command)]
        result = run_python(*words, cwd=tmp_path, env={**ENGINE_ENVIRONMENT, **hub})
        assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-2000:])
    text = (tmp_path / "report" / "card.md").read_text(encoding="utf-8")
    assert 'base_model: "org/Tiny-Llama"' in text
    assert (tmp_path / "report" / "badge.svg").is_file()
