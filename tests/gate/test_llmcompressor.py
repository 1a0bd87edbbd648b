"""Checkpoints that llm-compressor made, through the gate: what people ship, not our own recipes."""

from pathlib import Path

import pytest
from harness import LLMCOMPRESSOR, RunGate

from quantgate.subject.files import actual_scheme

pytestmark = [pytest.mark.long, pytest.mark.slow(reason="the whole gate on seven checkpoints")]

BUILD = Path(__file__).resolve().parents[2] / LLMCOMPRESSOR
# By the name of their recipe in tools/make_llmcompressor.py.
SCHEMES = {
    "fp8-dynamic": "FP8_DYNAMIC",
    "nvfp4": "NVFP4",
    "w4a16": "W4A16",
    "w4a16-awq": "W4A16_ASYM",
    "w4a16-gptq": "W4A16_STATIC_ACTORDER",
    "w8a8": "W8A8",
    "w8a8-smoothquant-gptq": "W8A8_STATIC_ACTORDER",
}


@pytest.mark.skipif(not BUILD.is_dir(), reason="python3 tools/make_llmcompressor.py makes them")
def test_every_one_of_them_passes(run_gate: RunGate, root: Path) -> None:
    files = run_gate.project / "fixtures" / "checkpoints"
    run_gate.remove_its_checkpoint()
    for name, scheme in SCHEMES.items():
        assert actual_scheme(BUILD / name) == scheme
        (files / f"{name}.toml").write_text(
            f'source = "./build/llmcompressor/{name}"\n'
            'base = "./fixtures/tiny/llama"\n'
            f'scheme = "{scheme}"\n'
            "golden = false\n\n"
            "[engine]\n"
            "enforce_eager = true\n"
            "kv_cache_memory_bytes = 134217728\n"
            'kernels = "portable"\n'
        )
    result = run_gate("suites", "--gate-report", "report")
    assert result.returncode == 0, result.stdout
    assert [entry["id"] for entry in run_gate.report["checkpoints"]] == sorted(SCHEMES)
    for entry in run_gate.report["checkpoints"]:
        assert entry["verdict"] == "pass"
        assert [check["name"] for check in entry["checks"]] == [
            "audit",
            "audit-weights",
            "audit-loaded",
            "fidelity-float32",
            "fidelity-serving",
            "replay-float32",
            "replay-serving",
            "divergence-from-reference",
            "divergence-from-base",
            "quality",
            "invariance-float32",
            "invariance-serving",
        ]
