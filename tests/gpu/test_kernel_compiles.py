"""The fused kernel compiles for GPUs that are not here, within the memory and registers they have.

That it runs there, and how fast, only a GPU can show.
"""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from quantgate.patches.scoremode import head_plan
from quantgate.patches.scoremode import logprob_triton as fused
from quantgate.patches.scoremode.head_plan import Tile

pytestmark = pytest.mark.slow(reason="compiles 22 kernels for GPUs")

# Shared memory a block may have, in bytes (CUDA C++ programming guide, "compute capabilities").
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes of stack a thread may take, by the bytes of an element: for what does not fit its 255
# registers between the products (64 and 160 with Triton 3.9, 192 and 160 with 3.6, which comes with
# torch 2.11). In the products' loop, nothing may go there.
STACK = {2: 192, 4: 160}
# The instruction that multiplies, in 16 bits, and how often a step's loop has it at least.
PRODUCTS = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
STEPS = {"HMMA": 64, "HGMMA": 4, "UTCHMMA": 4, "FFMA": 512}
BINARIES = "backends/nvidia/bin"


class Compiled(NamedTuple):
    """What one compilation gave."""

    ptx: str
    cubin: bytes
    shared: int


def compiled_for(capability: int, tile: Tile, *, blocks: bool, options: bool) -> Compiled:
    """Compile the kernel; `options` are bias and soft cap."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants: dict[str, Any] = {
        "BLOCKS": blocks,
        "HAS_BIAS": options,
        "HAS_CAP": options,
        "HAS_SCALE": options,
        "NO_COLUMN": fused.NO_COLUMN,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "DEPTH_BLOCK": head_plan.DEPTH_BLOCK,
        "BY_TMA": tile.by_tma,
    }
    kernel = fused._reduce_kernel
    element = "*fp32" if tile is head_plan.FLOAT32_TILE else "*bf16"
    read_by_tma = "tensordesc<bf16[{}, {}]>"
    types = {
        "hidden": read_by_tma.format(tile.rows, tile.depth) if tile.by_tma else element,
        "weight": read_by_tma.format(tile.columns, tile.depth) if tile.by_tma else element,
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
    aligned = ["hidden_size", "hidden_stride", "weight_stride"] + ["hidden", "weight"] * (
        not tile.by_tma
    )
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def nvidia(tool: str, *arguments: str | Path) -> str:
    """Return what one of the tools prints that Triton brings."""
    import triton

    path = Path(triton.__file__).parent / BINARIES / tool
    return subprocess.run(
        [path, *arguments], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


def stack_of(cubin: Path) -> int:
    """Return the bytes of stack that a thread of a compiled kernel takes."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", nvidia("cuobjdump", "--dump-resource-usage", cubin))
    assert found is not None
    assert int(found[1]) <= 255
    return int(found[2])


def product_loops(cubin: Path, instruction: str) -> list[str]:
    """Return the pieces of code between two labels that multiply a step's tiles."""
    pieces = re.split(r"\n\.L_\w+:", nvidia("nvdisasm", "-c", cubin))
    return [code for code in pieces if code.count(f" {instruction}") >= STEPS[instruction]]


@pytest.fixture(autouse=True)
def _compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_kernel_compiles(
    capability: int, element_bytes: int, blocks: bool, tmp_path: Path
) -> None:
    """With the tile that the rule gives such a device, its sums in registers or tensor memory."""
    tile = head_plan.tile_for(element_bytes, capability // 10)
    compiled = compiled_for(capability, tile, blocks=blocks, options=False)
    assert compiled.shared <= SHARED_MEMORY[capability]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.cubin)
    assert stack_of(cubin) <= STACK[element_bytes]
    # float32 stays off the tensor cores, which would round its factors to TF32.
    instruction = PRODUCTS[capability] if element_bytes == 2 else "FFMA"
    assert ("mma" in compiled.ptx) == (element_bytes == 2)
    loops = product_loops(cubin, instruction)
    assert loops
    for code in loops:
        assert "LDL" not in code
        assert "STL" not in code


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_it_compiles_with_a_bias_and_a_soft_cap(capability: int) -> None:
    tile = head_plan.tile_for(2, capability // 10)
    compiled = compiled_for(capability, tile, blocks=True, options=True)
    assert compiled.shared <= SHARED_MEMORY[capability]


def test_hoppers_tensor_cores_are_not_waited_for_within_a_step(tmp_path: Path) -> None:
    """One step's products run while the next ones are loaded; the wait for all ends a block."""
    compiled = compiled_for(90, head_plan.LARGE_TILE, blocks=True, options=False)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d)", compiled.ptx)
    assert sorted(waits) == ["0", "1"]


def test_a_tile_that_spills_is_found(tmp_path: Path) -> None:
    """The large tile outside Hopper, which is why it has another one."""
    compiled = compiled_for(100, head_plan.LARGE_TILE, blocks=True, options=False)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.cubin)
    assert stack_of(cubin) > STACK[2]
