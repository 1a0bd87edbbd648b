"""The fused kernel compiles for GPUs that are not here, within the memory that they have.

That it runs there, and how fast, only a GPU can show.
"""

from pathlib import Path
from typing import Any

import pytest

from quantgate.scoremode import logprob_triton as fused

pytestmark = pytest.mark.slow(reason="compiles nine kernels for GPUs")

# Shared memory a block may have, in bytes (CUDA C++ programming guide, "compute capabilities").
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("tile", [fused.LARGE_TILE, fused.SMALL_TILE, fused.FLOAT32_TILE])
def test_the_kernel_compiles(
    capability: int, tile: fused.Tile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants: dict[str, Any] = {
        "HAS_BIAS": True,
        "HAS_CAP": True,
        "GROUP": fused.GROUP,
        "NO_COLUMN": fused.NO_COLUMN,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
    }
    kernel = fused._reduce_kernel
    element = "*fp32" if tile is fused.FLOAT32_TILE else "*bf16"
    types = {
        "hidden_ptr": element,
        "weight_ptr": element,
        "bias_ptr": element,
        "targets_ptr": "*i64",
        "top1_ptr": "*i32",
        "soft_cap": "fp32",
        "scale": "fp32",
    }
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    # As the launcher finds them: aligned pointers and sizes are read in 16-byte pieces.
    aligned = ("hidden_ptr", "weight_ptr", "hidden_size", "hidden_stride", "weight_stride")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    assert len(compiled.asm["cubin"]) > 1000
    if tile is not fused.LARGE_TILE or SHARED_MEMORY[capability] >= fused.LARGE_TILE_SHARED_MEMORY:
        assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    tensor_cores = "wgmma" if capability == 90 else "mma.sync"
    # float32 stays off the tensor cores, which would round its factors to TF32.
    assert (tensor_cores in compiled.asm["ptx"]) == (tile is not fused.FLOAT32_TILE)
