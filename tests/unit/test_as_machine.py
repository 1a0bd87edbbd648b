"""What a processor can do, and what is hidden of it."""

from collections.abc import Callable
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.subject import processor

# What Linux calls what the machines differ in, and some that none of them asks about.
FLAGS = "sse4_1 sse4_2 avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx_vnni"
FLAGS += " avx512_bf16 amx_tile bmi2"


@pytest.fixture(scope="session")
def machines(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("as_machine")


@given(has=st.sets(st.sampled_from(FLAGS.split())), threads=st.sampled_from([None, 1, 2, 4]))
def test_a_processor_becomes_no_more_than_it_is(
    machines: ModuleType, has: set[str], threads: int | None
) -> None:
    for name, machine in machines.MACHINES.items():
        if missing := machine.needs - has:
            with pytest.raises(BadInput, match=rf"cannot run as {name}: it lacks {min(missing)}"):
                machines.environment_of(name, threads, frozenset(has))
            continue
        settings = machines.environment_of(name, threads, frozenset(has))
        is_more = any(flag.startswith(machine.hides) for flag in has)
        assert ("ATEN_CPU_CAPABILITY" in settings) is is_more
        assert settings.get("OMP_NUM_THREADS") == (None if threads is None else str(threads))


@pytest.mark.parametrize(
    ("flags", "limit", "exact"),
    [
        ({"avx2"}, "", False),
        ({"avx512_vnni"}, "", True),
        ({"avx512_vnni"}, "AVX2", False),
        ({"avx512_vnni"}, "SSE41", False),
        ({"avx512_vnni"}, "AVX512_CORE", False),
        ({"avx512_vnni"}, "avx512_core_vnni", True),
        ({"avx512_vnni"}, "AVX2_VNNI", False),
        ({"avx_vnni"}, "AVX2_VNNI", True),
        ({"avx_vnni"}, "no such limit", True),
        ({"avx2"}, "AVX512_CORE_AMX", False),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_vnni_counts_only_where_onednn_may_use_it(
    flags: set[str], limit: str, exact: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, limit)
    monkeypatch.setattr(processor, "flags", lambda: frozenset(flags))
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert processor.has_vnni() is exact
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_tile": True})
    assert processor.has_vnni()
