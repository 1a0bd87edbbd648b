"""A gate run with a kernel that the reference has no rule for."""

from pathlib import Path

from harness import RunGate

WITHOUT_A_RULE = """
import quantgate.formats.kernels as kernels
del kernels.RULES["DequantizingLinearKernel"]
"""


def test_a_kernel_without_a_rule_is_not_run_by_name(project: Path) -> None:
    """A whole gate run: what needs the reference is not judged, and no verdict calls it a fault."""
    with (project / "conftest.py").open("a") as stream:
        stream.write(WITHOUT_A_RULE)
    run_gate = RunGate(project)
    done = run_gate("suites", "-k", "float32 and (fidelity or replay or drift)",
                    "--gate-report", "report")  # fmt: skip
    assert done.returncode == 1
    (one,) = run_gate.report["checkpoints"]
    checks = {check["name"]: check for check in one["checks"]}
    assert one["verdict"] == "not-run"
    assert {name: check["verdict"] for name, check in checks.items()} == {
        "fidelity-float32": "not-run",
        "replay-float32": "not-run",
        "drift-float32": "pass",
    }
    for name in ("fidelity-float32", "replay-float32"):
        assert "DequantizingLinearKernel: the reference has no rule" in checks[name]["detail"]
    assert "Traceback" not in done.stdout
