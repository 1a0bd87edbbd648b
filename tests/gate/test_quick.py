"""`--quick` judges every format, task and check at least once."""

from pathlib import Path

from harness import RunGate


def test_the_quick_choice_has_every_check(root: Path) -> None:
    def checks(*options: str) -> set[str]:
        listed = RunGate(root)("suites", "--collect-only", "-q", *options)
        assert listed.returncode == 0, listed.stdout + listed.stderr
        ids = [line for line in listed.stdout.splitlines() if "-cpu" in line]
        # "…test_drift[tiny-llama-w4a16-cpu-float32]" without the checkpoint.
        return {f"{i.partition('[')[0]} {i.partition('-cpu')[2]}" for i in ids}

    every, quick = checks(), checks("--quick")
    assert len(every) > 15
    # Each other engine in one of the two dtypes; no check is left out altogether.
    assert every - quick == {
        "suites/test_invariance.py::test_tensor_parallel -serving]",
        "suites/test_invariance.py::test_compiled -float32]",
    }
    assert {name.split()[0] for name in quick} == {name.split()[0] for name in every}


def test_a_choice_of_nothing_is_an_error(run_gate: RunGate) -> None:
    file = run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    file.write_text(file.read_text().replace("quick = true\n", ""))
    ran = run_gate("suites", "--quick")
    assert ran.returncode == 4
    assert "--quick: none of the 1 files in " in ran.stderr
    ran = run_gate("suites", "--quick", "--checkpoint", "tiny-llama-w4a16")
    assert ran.returncode == 4
    assert "--quick cannot be combined with named checkpoints" in ran.stderr
