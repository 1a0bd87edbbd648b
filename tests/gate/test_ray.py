"""`quantgate gate --ray` on a real Ray of two nodes: one report, whatever happens to a node."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import EIGHT, FIVE, but_for_times, persons_environment, project_of, running, wait_until

pytestmark = [
    pytest.mark.slow(reason="a Ray of two nodes, and gates in processes of their own"),
    pytest.mark.long,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

# The audit of files starts no engine.
FILES_ONLY = ("--", "-k", "audit and not loaded and not seen")
EVERY_CHECK = ("-k", "not tensor and not compiled")
# What the gate's process does before its checks: it says that it is there, and waits.
HOLD = """
import os, pathlib, time

def pytest_collection_finish(session):
    shard = str(session.config.getoption("shard")).partition("/")[0]
    pathlib.Path(f"began-{shard}-{os.getpid()}").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
"""
LONGEST = 2400  # seconds
# All runs compute with as many threads: Ray gives a task one for each processor that it has.
SETTINGS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

Nodes = Callable[[], tuple[str, list[Any], Any]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Return a Ray of two nodes with a processor each: its address, they, and the cluster."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(persons_environment()):
            patch.delenv(name)
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        there: list[Any] = []

        def two() -> tuple[str, list[Any], Any]:
            there[:] = [node for node in there if node in cluster.worker_nodes]
            while len(there) < 2:
                there.append(cluster.add_node(num_cpus=1))
            cluster.wait_for_nodes()
            return str(cluster.address), there, cluster

        yield two
        cluster.shutdown()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "quantgate", *words]


def quantgate(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=project, env={**persons_environment(), **SETTINGS},
        capture_output=True, text=True, check=False, timeout=LONGEST,
    )  # fmt: skip


def report(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "gate.json").read_text()))


def began(project: Path) -> Counter[str]:
    """Count how often the gate of each shard has begun."""
    return Counter(path.name.split("-")[1] for path in project.glob("began-*"))


@pytest.fixture
def five(project: Path, root: Path) -> Path:
    made = project_of(project, root, *FIVE)
    with (made / "conftest.py").open("a") as stream:
        stream.write(HOLD)
    return made


def test_a_killed_node_costs_one_retry_and_nothing_else(
    five: Path, root: Path, nodes: Nodes
) -> None:
    address, (victim, _), cluster = nodes()
    document = (root / "docs" / "many-machines.md").read_text(encoding="utf-8")
    *_, documented = re.findall(r"^    quantgate (.*)$", document, re.MULTILINE)
    assert documented == "gate --ray"
    log = five / "said.txt"
    words = command(*documented.split(), *FILES_ONLY)
    environment = {**persons_environment(), **SETTINGS, "RAY_ADDRESS": address}
    with running(words, log, cwd=five, env=environment) as driver:
        wait_until(lambda: len(began(five)) == 2, driver, log, LONGEST)
        pids = {int(path.name.split("-")[2]) for path in five.glob("began-*")}
        # Meanwhile the report is there, and says that nothing is judged yet.
        waiting = report(five / "report")
        assert {one["verdict"] for one in waiting["checkpoints"]} == {"not-run"}
        assert [one["id"] for one in waiting["checkpoints"]] == list(FIVE)
        cluster.remove_node(victim, allow_graceful=False)
        # Its gate has ended, too: it would judge beside the one that is started in its place.
        wait_until(lambda: sum(map(alive, pids)) == 1, driver, log, 60)
        (five / "go").touch()
        assert driver.wait(LONGEST) == 0, log.read_text()
    said = log.read_text()
    assert sorted(began(five).values()) == [1, 1, 1, 1, 2], said
    assert "note: nodes were lost (" in said
    for number in range(1, 6):
        assert f"{number} of 5: " in said
    whole = quantgate(five, "gate", "--report", "whole", *FILES_ONLY)
    assert whole.returncode == 0, whole.stdout
    ours, theirs = (but_for_times(report(five / name)) for name in ("report", "whole"))
    assert ours == theirs


def test_what_ends_without_results_is_not_run(five: Path, nodes: Nodes) -> None:
    """One whose gate is killed is judged again; one that cannot be judged is not-run."""
    address, _, _ = nodes()
    file = five / "fixtures" / "checkpoints" / "tiny-llama-fp8.toml"
    file.write_text(file.read_text().replace('scheme = "FP8"', 'scheme = "W8A8"'))
    log = five / "said.txt"
    environment = {**persons_environment(), **SETTINGS}
    with running(
        command("gate", "--ray", address, *FILES_ONLY), log, cwd=five, env=environment
    ) as driver:
        wait_until(lambda: len(began(five)) == 2, driver, log, LONGEST)
        shard = next(name for name in began(five) if name != "1")
        (path,) = five.glob(f"began-{shard}-*")
        os.kill(int(path.name.split("-")[2]), signal.SIGKILL)
        (five / "go").touch()
        assert driver.wait(LONGEST) == 1, log.read_text()
    assert sorted(began(five).values()) == [1, 1, 1, 1, 2]
    assert began(five)[shard] == 2
    found = report(five / "report")
    verdicts = {one["id"]: one["verdict"] for one in found["checkpoints"]}
    assert verdicts == {name: "not-run" if name == FIVE[0] else "pass" for name in FIVE}
    (check,) = found["checkpoints"][0]["checks"]
    assert "ended without results: " in check["detail"]
    assert "'W8A8'" in check["detail"]
    assert check["next_step"] == "read report/shard-1-of-5/gate.log, which is all that it printed"
    assert "'W8A8'" in (five / "report" / "shard-1-of-5" / "gate.log").read_text()
    # What tasks have returned is there to be merged again.
    again = quantgate(
        five, "merge", *(f"report/shard-{n}-of-5" for n in range(1, 6)), "--report", "m"
    )
    assert again.returncode == 1
    assert report(five / "m")["verdict"] == "not-run"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_eight_checkpoints_with_every_check(project: Path, root: Path, nodes: Nodes) -> None:
    """As one run judges them: but for times, the report is the same to the last digit.

    On a small probe a check may be inconclusive; then it is so in both.
    """
    project_of(project, root, *EIGHT)
    (project / "suites" / "test_seen.py").unlink()
    address, _, _ = nodes()
    whole = quantgate(project, "gate", "--report", "whole", "--", *EVERY_CHECK)
    # The nodes share a cache of their own, which begins as empty as the other run's.
    words = ("--ray", address, "--", "--gate-cache", "cache-of-nodes", *EVERY_CHECK)
    spread = quantgate(project, "gate", *words)
    ours, theirs = (report(project / name) for name in ("report", "whole"))
    assert [one["id"] for one in ours["checkpoints"]] == sorted(EIGHT)
    assert {one["verdict"] for one in ours["checkpoints"]} <= {"pass", "inconclusive"}, (
        spread.stdout
    )
    assert spread.returncode == whole.returncode == (ours["verdict"] != "pass")
    assert all(one["probes"] for one in ours["checkpoints"])
    assert ours["engines"]
    assert but_for_times(ours) == but_for_times(theirs)
