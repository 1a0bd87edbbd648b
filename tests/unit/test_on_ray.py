"""`quantgate gate --ray` without Ray: what tasks are asked for, and what becomes of each answer."""

import builtins
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_runs import PROBE, run_of

from quantgate.__main__ import main, parse
from quantgate.commands.ray_task import GateKilled, Judged, judge
from quantgate.reporting.merge import RESULTS, results_json
from quantgate.reporting.run import Run
from quantgate.reporting.shard import Shard

IDS = ("a", "b", "c")
OTHER = replace(PROBE, file_sha256="9" * 64)


class Lost(Exception):
    """What the fake raises for a task that it gives up."""


def node(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": resources}


@dataclass
class FakeRay:
    """Runs each task when its result is asked for; `answer` replaces what a shard's would be."""

    answer: Callable[[Run], Judged]
    there: list[dict[str, Any]] = field(default_factory=lambda: [node("n", CPU=4)])
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    said: list[tuple[list[str], str, dict[str, str]]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    exceptions: Any = field(default_factory=lambda: SimpleNamespace(RayError=Lost))

    def init(self, address: str, **_: Any) -> None:
        self.address = address

    def shutdown(self) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return self.there

    def remote(self, function: Any) -> Any:
        assert function is judge

        def options(**given: Any) -> Any:
            self.options[given["name"]] = given
            return SimpleNamespace(remote=start)

        def start(words: list[str], directory: str, settings: dict[str, str]) -> str:
            self.said.append((words, directory, settings))
            return words[words.index("--shard") + 1]

        return SimpleNamespace(options=options)

    def wait(self, tasks: list[str], num_returns: int) -> tuple[list[str], list[str]]:
        assert num_returns == 1
        self.seen.append(Path("report", "gate.json").read_text())
        return tasks[-1:], tasks[:-1]  # the last one first

    def get(self, name: str) -> Judged:
        number, of = map(int, name.split("/"))
        return self.answer(run_of(Shard(number, of, IDS)))


def returned(run: Run) -> Judged:
    return Judged(results_json(run).encode(), "what it printed\nits last line\n", "far")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "fixtures" / "checkpoints"
    folder.mkdir(parents=True)
    for name in IDS:
        (folder / f"{name}.toml").write_text(f'source = "./{name}"\nscheme = "W4A16"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    def install(answer: Callable[[Run], Judged] = returned, *nodes: dict[str, Any]) -> FakeRay:
        ray = FakeRay(answer)
        ray.there = list(nodes) or ray.there
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return install


Use = Callable[..., FakeRay]


def verdicts() -> dict[str, str]:
    content = json.loads(Path("report", "gate.json").read_text())
    return {one["id"]: one["verdict"] for one in content["checkpoints"]}


def why(name: str) -> str:
    content = json.loads(Path("report", "gate.json").read_text())
    (one,) = [one for one in content["checkpoints"] if one["id"] == name]
    return str(one["checks"][0]["detail"])


def test_each_checkpoint_is_a_task(
    project: Path, use: Use, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANTGATE_X", "1")
    ray = use()
    assert main(["gate", "--ray", "--tier", "quick", "--", "-k", "quality"]) == 0
    assert ray.address == "auto"
    for number, (words, directory, settings) in enumerate(ray.said, start=1):
        given = parse(words)
        assert (given.shard, given.pytest) == (f"{number}/3", ["--tier", "quick", "-k", "quality"])
        assert (given.project, directory, settings) == (project, str(project), {"QUANTGATE_X": "1"})
    assert list(ray.options) == ["gate a", "gate b", "gate c"]
    assert {(one["num_gpus"], one["num_cpus"]) for one in ray.options.values()} == {(0, 4)}
    assert {one["max_retries"] for one in ray.options.values()} == {2}
    assert {tuple(one["retry_exceptions"]) for one in ray.options.values()} == {(GateKilled,)}
    assert verdicts() == dict.fromkeys(IDS, "pass")
    said = capsys.readouterr().out
    assert said.startswith("1 of 3: c: pass\n2 of 3: b: pass\n3 of 3: a: pass\n")
    assert "note: nodes were lost" not in said


def test_the_report_grows_while_tasks_run(project: Path, use: Use) -> None:
    ray = use()
    assert main(["gate", "--ray"]) == 0
    counted = [
        [one["verdict"] for one in json.loads(text)["checkpoints"]].count("not-run")
        for text in ray.seen
    ]
    assert counted == [3, 2, 1]
    assert json.loads(ray.seen[0])["verdict"] == "not-run"


def test_a_task_has_the_gpus_that_its_checks_can_use(project: Path, use: Use) -> None:
    folder = project / "fixtures" / "checkpoints"
    more = {"a": "[engine]\ntensor_parallel_size = 4\n", "b": 'invariance = ["tensor-parallel"]\n'}
    for name, text in more.items():
        path = folder / f"{name}.toml"
        path.write_text(path.read_text() + text)
    ray = use(returned, node("small", CPU=2, GPU=1), node("big", CPU=64, GPU=2))
    assert main(["gate", "--ray"]) == 1
    given = {name: (one["num_gpus"], one["num_cpus"]) for name, one in ray.options.items()}
    assert given == {"gate b": (2, 1), "gate c": (1, 1)}
    assert verdicts() == {"a": "not-run", "b": "pass", "c": "pass"}
    assert "its engine needs 4 GPUs, and the largest node of this Ray has 2" in why("a")
    ray = use(returned, node("one", CPU=2, GPU=1))
    main(["gate", "--ray"])
    assert ray.options["gate b"]["num_gpus"] == 1


def lost(run: Run) -> Judged:
    raise Lost("Task failed.\n\nThe node is dead.\n")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lost, "its task was lost, with 2 retries (The node is dead.)"),
        (
            lambda run: Judged(None, "…\nERROR: it is broken\n\n", "far"),
            "its gate on far ended without results: ERROR: it is broken",
        ),
        (lambda run: Judged(b"{", "", "far"), "not the results of a shard"),
        (
            lambda run: returned(replace(run, results=[replace(run.results[0], probes=(OTHER,))])),
            "far has scored a probe 'tiny' whose file has the sha256 999999999999…, and another",
        ),
        (
            lambda run: returned(replace(run, shard=Shard(2, 3, ("a", "x", "z")))),
            "far has selected a, x, z, and this machine a, b, c: they have different checkpoint",
        ),
    ],
)
def test_what_has_no_results_is_not_run(
    project: Path, use: Use, answer: Callable[[Run], Judged], said: str
) -> None:
    earlier = project / "report" / "shard-2-of-3" / RESULTS
    earlier.parent.mkdir(parents=True)
    earlier.write_text(results_json(run_of(Shard(2, 3, IDS))))
    use(lambda run: answer(run) if run.shard and run.shard.number == 2 else returned(run))
    assert main(["gate", "--ray"]) == 1
    assert verdicts() == {"a": "pass", "b": "not-run", "c": "pass"}
    assert said in why("b")


def test_none_has_results(project: Path, use: Use) -> None:
    earlier = project / "report" / "shard-2-of-3" / RESULTS
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    use(lost)
    assert main(["gate", "--ray"]) == 1
    assert verdicts() == dict.fromkeys(IDS, "not-run")
    assert not earlier.exists()  # `merge` would take it for this run's


def test_a_lost_node_is_said(project: Path, use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(run: Run) -> Judged:
        ray.there = ray.there[1:]
        return returned(run)

    ray = use(answer, *(node(f"10.0.0.{n}", CPU=1) for n in range(1, 5)))
    assert main(["gate", "--ray"]) == 0
    assert "note: nodes were lost (10.0.0.1, 10.0.0.2, 10.0.0.3)" in capsys.readouterr().out


def test_a_quick_selection_is_what_the_nodes_select(project: Path, use: Use) -> None:
    path = project / "fixtures" / "checkpoints" / "b.toml"
    path.write_text(path.read_text() + "quick = true\n")
    ray = use(lambda run: returned(replace(run, shard=Shard(1, 1, ("b",)))))
    main(["gate", "--ray", "--", "--quick"])
    assert list(ray.options) == ["gate b"]


def test_ray_that_is_not_installed_is_one_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return stock(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["gate", "--ray"]) == 4
    error = capsys.readouterr().err
    assert "--ray needs Ray, which is not installed: `pip install 'quantgate[ray]'`" in error
    assert error.count("\n") == 1


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ray", f"127.0.0.1:{closed_port()}"], "nothing answers there"),
        (["--ray", "127.0.0.1:99999"], "nothing answers there"),
        (["--ray", "./a"], "not the HOST:PORT of Ray's head, nor 'auto' or 'local'"),
        (["--ray", "--shard", "1/3"], "--ray makes a shard of each checkpoint; leave out --shard"),
        (["nowhere", "--ray"], "nowhere: neither a directory, nor a hub id"),
    ],
)
def test_what_cannot_begin_is_one_sentence(
    project: Path, use: Use, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    use()
    assert main(["gate", *words]) == 4
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (project / "report").exists()


@pytest.mark.parametrize("error", [ConnectionError("no Ray here"), SystemExit(15)])
def test_a_ray_that_lets_nobody_in_is_one_sentence(
    project: Path, use: Use, error: BaseException, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ray = use()

    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    assert main(["gate", "--ray"]) == 4
    assert "--ray auto: no connection to Ray" in capsys.readouterr().err


def script(folder: Path, text: str) -> None:
    """Put a `quantgate` in place of the package, in the directory where the task runs."""
    (folder / "quantgate.py").write_text(text)


def test_a_task_returns_the_results_and_what_was_said(tmp_path: Path) -> None:
    script(
        tmp_path,
        "import pathlib, sys, os\n"
        "folder = pathlib.Path(sys.argv[-1], 'shard-1-of-2')\n"
        "folder.mkdir()\n"
        "(folder / 'results.json').write_text(os.environ['QUANTGATE_X'])\n"
        "print(*sys.argv[1:-1])\n"
        "print('an error', file=sys.stderr)\n"
        "sys.exit(1)\n",
    )
    found = judge(["gate", "--"], str(tmp_path), {"QUANTGATE_X": "é"})
    assert found.results == "é".encode()
    assert "gate -- --gate-report\n" in found.said
    assert "an error\n" in found.said
    script(tmp_path, "print('ERROR: no')")
    assert judge(["gate", "--"], str(tmp_path), {}).results is None


def test_a_killed_gate_is_tried_again_and_a_missing_directory_is_not(tmp_path: Path) -> None:
    script(tmp_path, "import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(GateKilled, match="signal 9 ended the gate"):
        judge(["gate", "--"], str(tmp_path), {})
    missing = judge(["gate", "--"], str(tmp_path / "nowhere"), {})
    assert missing.results is None
    assert "nowhere: no such directory on " in missing.said
