"""What a gate run on CUDA judges, and what it says: on a made-up one, whose engines run on the CPU.

It shows which checks are selected, served in which dtype and stored under which name; no kernel.
"""

import json
import shutil
from pathlib import Path

import pytest
from harness import RunGate, persons_environment, project_of
from preloaded import run_python

from quantgate.subject.processor import is_x86_without_vnni

pytestmark = pytest.mark.slow(reason="every check of several checkpoints, as on CUDA")

MADE_UP = """
import quantgate.measuring.environment
quantgate.measuring.environment.available_devices = lambda: {"cuda": "sm90"}
"""
FEW_STEPS = 17
QUANTIZED, WHOLE, REWARDS = "tiny-llama-w8a8", "tiny-llama", "tiny-prm-qwen2-w8a8"


# The made-up GPU's int8 kernel is the CPU's, which saturates where there is no VNNI.
SATURATES = "".join(
    f"""
[[known_failure]]
check = "{check}"
reason = "oneDNN's int8 product saturates on x86 without VNNI"
issue = "docs/formats.md"
when = "x86-without-vnni"
strict = false
"""
    for check in ("fidelity-serving", "replay-serving", "divergence-from-reference")
)


@pytest.fixture
def on_a_gpu(project: Path, root: Path) -> RunGate:
    """A project of three checkpoints and no goldens, on a machine that says it has a GPU."""
    project_of(project, root, QUANTIZED, WHOLE, REWARDS)
    shutil.rmtree(project / "golden")
    shutil.copytree(root / "tools", project / "tools")
    # Too few to decide on quality, which says the same of the steps on any device.
    larger = project / "fixtures" / "probes" / "steps-quality.jsonl"
    larger.write_text("".join(larger.read_text().splitlines(keepends=True)[:FEW_STEPS]))
    file = project / "fixtures" / "checkpoints" / f"{WHOLE}.toml"
    asking = 'golden = false\ninvariance = ["tensor-parallel"]\n[engine]'
    file.write_text(file.read_text().replace("[engine]", asking))
    for name in (QUANTIZED, REWARDS):
        with (project / "fixtures" / "checkpoints" / f"{name}.toml").open("a") as stream:
            stream.write(SATURATES)
    with (project / "conftest.py").open("a") as stream:
        stream.write(MADE_UP)
    tool = project / "tools" / "regen_golden.py"
    tool.write_text(tool.read_text().replace('if __name__ == "__main__":', f"{MADE_UP}\nif 1:"))
    return RunGate(project)


def test_the_gate_is_green_on_cuda_with_goldens_of_its_own(on_a_gpu: RunGate) -> None:
    """Approve, judge, and judge again with another kernel."""
    approved = run_python(
        "tools/regen_golden.py", "--all", "--reason", "first release", "--accept-failing",
        cwd=on_a_gpu.project, env=persons_environment(),
    )  # fmt: skip
    assert approved.returncode == 0, approved.stdout + approved.stderr
    written = {str(p.relative_to(on_a_gpu.project / "golden"))
               for p in (on_a_gpu.project / "golden").rglob("drift-*.json")}  # fmt: skip
    assert written == {f"{name}/drift-serving.sm90.json" for name in (QUANTIZED, REWARDS)}
    golden = on_a_gpu.project / "golden" / QUANTIZED / "drift-serving.sm90.json"
    content = json.loads(golden.read_text())
    assert content["key"]["kernels"] == "native"  # what its file says is of CPUs
    assert [entry["reason"] for entry in content["history"]] == ["first release"]

    without = f"not seen and not invariance and not (quality and {REWARDS})"
    selected = ["-m", "gpu", "-k", without, "--gate-report", "report"]
    judged = on_a_gpu("suites", *selected)
    found = {one["id"]: one["checks"] for one in on_a_gpu.report["checkpoints"]}
    assert "CUDA kernels of quantized linears compute in 16 bits, not in float32" in judged.stdout
    for name in (QUANTIZED, REWARDS):
        assert not any(check["name"].endswith("float32") for check in found[name])
    assert {check["name"] for check in found[REWARDS]} >= {"activation", "head", "steps"}
    assert {check["name"] for check in found[WHOLE]} >= {"fidelity-float32", "replay-float32"}
    failing = [check for checks in found.values() for check in checks if check["verdict"] != "pass"]
    assert [check for check in failing if not check["known_failure"]] == []
    assert bool(failing) == is_x86_without_vnni()
    assert "since the golden" not in judged.stdout
    assert judged.returncode == 0, judged.stdout

    ranks = on_a_gpu("suites", "--checkpoint", WHOLE, "-k", "tensor_parallel or replay")
    assert f"skipped: {WHOLE} tensor-parallel-" in ranks.stdout
    assert "it needs 2 GPUs, and 0 can be used here" in ranks.stdout
    assert ranks.returncode == 0, ranks.stdout

    forced = on_a_gpu(
        "suites", *selected, "--checkpoint", QUANTIZED,
        VLLM_DISABLED_KERNELS="CPUInt8ScaledMMLinearKernel",
    )  # fmt: skip
    changed = "CPUInt8ScaledMMLinearKernel → DequantizingInt8LinearKernel"
    assert f"self_attn.qkv_proj {changed}" in forced.stdout.partition("since the golden: ")[2]
    (one,) = on_a_gpu.report["checkpoints"]
    for check in one["checks"]:
        if check["n"] is not None:
            assert changed in check["since_golden"]
            assert check["kernels"]["self_attn.qkv_proj"] == "DequantizingInt8LinearKernel"
