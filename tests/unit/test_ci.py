"""The action, the workflows and the Dockerfile: read as GitHub and Docker read them, and run here.

Steps of the action run in bash with a `quantgate` and a `gh` that write down what they are asked.
"""

import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from quantgate.__main__ import main, parse

EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
# What GitHub puts before a step's script.
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]


@pytest.fixture
def action(root: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((root / "action.yml").read_text()))


@pytest.fixture
def steps(action: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in action["runs"]["steps"]}


def expressions(content: object) -> Iterator[str]:
    for text in EXPRESSION.findall(json.dumps(content)):
        yield from re.findall(r"inputs\.([\w-]+)", text)


def workflows(root: Path) -> dict[str, Any]:
    paths = [
        root / ".github" / "workflows" / "gate.yml",
        root / "src" / "quantgate" / "commands" / "new_project" / "workflow.yml",
        root / "docs" / "examples" / "github-actions.yml",
    ]
    return {path.name: yaml.safe_load(path.read_text()) for path in paths}


def blocks(root: Path, language: str) -> list[str]:
    text = (root / "docs" / "ci.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_action_uses_its_inputs_and_no_others(action: dict[str, Any]) -> None:
    conditions = " ".join(str(step.get("if", "")) for step in action["runs"]["steps"])
    used = {*expressions(action), *re.findall(r"inputs\.([\w-]+)", conditions)}
    assert used == set(action["inputs"])
    assert all(value["description"] for value in action["inputs"].values())


def test_no_script_is_made_of_an_expression(root: Path, action: dict[str, Any]) -> None:
    """An input that is put into a script could be one itself; it is passed as a variable."""
    jobs = [job for flow in workflows(root).values() for job in flow["jobs"].values()]
    every = [*action["runs"]["steps"], *(step for job in jobs for step in job["steps"])]
    for step in every:
        if "run" in step:
            assert not EXPRESSION.search(step["run"]), step
            assert subprocess.run(["bash", "-n", "-c", step["run"]]).returncode == 0
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+|\./\.quantgate", step["uses"]), step
    assert all(step["shell"] == "bash" for step in action["runs"]["steps"] if "run" in step)


FAKE = """#!/usr/bin/env python3
import json, os, pathlib, sys
with open(os.environ["SAID"], "a") as stream:
    stream.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""
GATE = (
    FAKE
    + """
report = pathlib.Path(sys.argv[sys.argv.index("--report") + 1])
report.mkdir(exist_ok=True)
(report / "gate.json").write_text('{"verdict": "fail"}')
(report / "gate.md").write_text("## the table\\n")
sys.exit(1)
"""
)
GH = (
    FAKE
    + """
if "--paginate" in sys.argv:
    assert os.environ["MARKER"].startswith("<!-- quantgate")
    print(os.environ["COMMENTS"], end="")
elif (field := sys.argv[sys.argv.index("--field") + 1]).startswith("body=@"):
    pathlib.Path(os.environ["SAID"]).with_name("body").write_text(open(field[6:]).read())
"""
)


class Job:
    """A job's folders and variables, and the commands that were called in it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.said = directory, directory / "said"
        commands = {"quantgate/bin/quantgate": GATE, "bin/gh": GH}
        for name, text in commands.items():
            (path := directory / name).parent.mkdir(parents=True)
            path.write_text(text)
            path.chmod(0o755)

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {
            **os.environ,
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.directory),
            "GITHUB_OUTPUT": str(self.directory / "output"),
            "GITHUB_STEP_SUMMARY": str(self.directory / "summary"),
            "GITHUB_REPOSITORY": "o/r",
            "SAID": str(self.said),
            "REPORT": "report",
            **environment,
        }
        return subprocess.run(
            [*BASH, script], cwd=self.directory, env=variables, capture_output=True, text=True
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.said.read_text().splitlines()]


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (
            {"CHECKPOINT": "", "BASE": "", "ARGUMENTS": ""},
            ["--project", ".", "--report", "report", "--"],
        ),
        (
            {"CHECKPOINT": "./a org/b", "BASE": "my base", "ARGUMENTS": "-m gpu -x"},
            ["./a", "org/b", "--project", ".", "--report", "report", "--base", "my base",
             "--", "-m", "gpu", "-x"],
        ),
        (
            {"CHECKPOINT": "$(touch x)", "BASE": "; touch x", "ARGUMENTS": "`touch x`"},
            ["$(touch", "x)", "--project", ".", "--report", "report", "--base", "; touch x",
             "--", "`touch", "x`"],
        ),
    ],
)  # fmt: skip
def test_the_action_judges_and_says_the_verdict(
    steps: dict[str, Any], tmp_path: Path, given: dict[str, str], asked: list[str]
) -> None:
    job = Job(tmp_path)
    done = job.run(steps["Judge"]["run"], PROJECT=".", **given)
    assert done.returncode == 1, done.stderr  # the gate's
    assert job.calls() == [["quantgate", "gate", *asked]]
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "output").read_text() == "verdict=fail\n"
    namespace = parse(job.calls()[0][1:])
    assert (namespace.checkpoints, namespace.pytest) == (
        given["CHECKPOINT"].split(), given["ARGUMENTS"].split(),
    )  # fmt: skip
    assert job.run(steps["Summarize"]["run"]).returncode == 0
    assert (tmp_path / "summary").read_text() == "## the table\n"


def test_an_earlier_report_is_not_taken_for_this_one(steps: dict[str, Any], tmp_path: Path) -> None:
    job = Job(tmp_path)
    (tmp_path / "report").mkdir()
    for name in ("gate.json", "gate.md"):
        (tmp_path / "report" / name).write_text('{"verdict": "pass"}')
    (tmp_path / "quantgate" / "bin" / "quantgate").write_text("#!/bin/sh\nexit 4\n")
    done = job.run(steps["Judge"]["run"], PROJECT=".", CHECKPOINT="", BASE="", ARGUMENTS="")
    assert done.returncode == 4
    assert not (tmp_path / "output").exists()
    for name in ("Summarize", "Comment on the pull request"):
        assert job.run(steps[name]["run"], NUMBER="7", ARTIFACT="a").returncode == 0
    assert not (tmp_path / "summary").exists()
    assert not job.said.exists()


@pytest.mark.parametrize(
    ("comments", "method", "path"),
    [
        ("", "POST", "repos/o/r/issues/7/comments"),
        ("12\n15\n", "PATCH", "repos/o/r/issues/comments/12"),
    ],
)
def test_the_action_keeps_one_comment(
    steps: dict[str, Any], tmp_path: Path, comments: str, method: str, path: str
) -> None:
    job = Job(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "gate.md").write_text("## the table\n")
    script = steps["Comment on the pull request"]["run"]
    done = job.run(script, NUMBER="7", ARTIFACT="quantgate", COMMENTS=comments)
    assert done.returncode == 0, done.stderr
    _, (*_, asked, where, field, body) = job.calls()
    assert (asked, where, field) == (method, path, "--field")
    assert body.startswith("body=@")
    assert (tmp_path / "body").read_text() == "<!-- quantgate quantgate -->\n## the table\n"


def test_the_reusable_workflow_gives_the_action_what_it_takes(
    root: Path, action: dict[str, Any]
) -> None:
    flow = workflows(root)["gate.yml"]
    inputs = flow[True]["workflow_call"]["inputs"]  # "on" is true in YAML 1.1
    (job,) = flow["jobs"].values()
    assert set(expressions(job)) == set(inputs)
    (own,) = [step for step in job["steps"] if step["uses"] == "./.quantgate"]
    assert set(own["with"]) <= set(action["inputs"])
    for name in own["with"]:
        assert inputs[name]["default"] == action["inputs"][name]["default"], name
    assert json.loads(inputs["runs-on"]["default"]) == "ubuntu-latest"


def test_the_examples_in_the_document_are_accepted(root: Path, action: dict[str, Any]) -> None:
    reusable = workflows(root)["gate.yml"][True]["workflow_call"]["inputs"]
    seen = []
    for flow in map(yaml.safe_load, blocks(root, "yaml")):
        for job in flow.get("jobs", {}).values():
            if "uses" in job:
                assert (
                    root / job["uses"].partition("@")[0].removeprefix("OWNER/quantgate/")
                ).is_file()
                assert set(job["with"]) <= set(reusable)
                needed = {name for name, value in reusable.items() if value.get("required")}
                assert needed <= set(job["with"])
                json.loads(job["with"]["runs-on"])
                seen.append("workflow")
            for step in job.get("steps", ()):
                if step.get("uses") == "OWNER/quantgate@REF":
                    assert set(step["with"]) <= set(action["inputs"])
                    seen.append("action")
    assert sorted(seen) == ["action", "workflow"]


def test_the_commands_of_workflows_and_documents_are_accepted(root: Path) -> None:
    """Each `quantgate …` that a reader may copy."""
    steps = [step.get("run", "") for flow in workflows(root).values()
             for job in flow["jobs"].values() for step in job["steps"]]  # fmt: skip
    gitlab = [yaml.safe_load(block) for block in blocks(root, "yaml") if "script:" in block]
    steps += gitlab[0]["gate"]["script"]
    assert steps.count("quantgate gate") == 2
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for step in steps:
        if found := re.search(r'pip install .*"quantgate\[(\w+)\]"', step):
            assert found[1] in project["optional-dependencies"]
    joined = "\n".join(blocks(root, "sh")).replace("\\\n", "")
    containers = [line.partition("quantgate ")[2] for line in joined.splitlines() if "run" in line]
    assert len(containers) == 2
    texts = [(root / name).read_text() for name in ("README.md", "docs/ci.md",
             "docs/model-card.md", "docs/adding-a-checkpoint.md", "docs/gpu.md")]  # fmt: skip
    written = re.findall(r"^ {4,}quantgate (.*)$", "\n".join(texts), re.MULTILINE)
    assert len(written) >= 10
    for command in [*written, *containers]:
        assert callable(parse(shlex.split(command)).run), command


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their arguments, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, rest in found]


def test_the_dockerfile_adds_the_gate_to_a_vllm_that_it_supports(root: Path) -> None:
    found = instructions((root / "Dockerfile").read_text())
    known = {"ARG", "FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known
    arguments = dict(rest.split("=") for name, rest in found if name == "ARG")
    (image,) = [rest for name, rest in found if name == "FROM"]
    assert image == "vllm/vllm-openai:${VLLM}"
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = {r.name: r for r in map(Requirement, project["optional-dependencies"]["gpu"])}
    versions = [
        arguments["VLLM"],
        *re.findall(r"VLLM=(v[\d.]+)", (root / "Dockerfile").read_text()),
    ]
    for version in versions:
        assert version.removeprefix("v") in asked["vllm"].specifier, version
    (entry,) = [json.loads(rest) for name, rest in found if name == "ENTRYPOINT"]
    assert [*project["scripts"]] == entry
    (default,) = [json.loads(rest) for name, rest in found if name == "CMD"]
    assert callable(parse(default).run)
    (installed,) = [rest for name, rest in found if name == "RUN"]
    assert installed == 'python3 -m pip install --no-cache-dir "/opt/quantgate[gpu]"'


def test_the_dockerfile_copies_what_the_wheel_is_built_from(root: Path) -> None:
    """And the files that Docker may see are those."""
    copied = [shlex.split(rest) for name, rest in instructions((root / "Dockerfile").read_text())
              if name == "COPY"]  # fmt: skip
    sources = {source: to for *names, to in copied for source in names}
    assert all((root / source).exists() for source in sources)
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["only-include"], settings["project"]["readme"],
              *settings["project"]["license-files"], "pyproject.toml"}  # fmt: skip
    assert needed == {"src/quantgate" if name == "src" else name for name in sources}
    for source, to in sources.items():
        assert to.rstrip("/") == "/opt/quantgate" + (
            f"/{source}" if (root / source).is_dir() else ""
        )
    seen = (root / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in seen if line.startswith("!")} == set(sources)


def test_the_documented_init_makes_a_repository(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "docs" / "ci.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    quantgate (init .*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert "models/.github/workflows/quantgate.yml" in made
    assert any(name.startswith("models/fixtures/checkpoints/") for name in made)
    assert (tmp_path / "models" / "golden").is_dir()
