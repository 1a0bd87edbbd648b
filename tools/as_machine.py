"""Run a command as a lesser processor, as far as software can choose.

    python tools/as_machine.py sse41 --threads 1 -- .venv/bin/pytest suites --checkpoint ID

Libraries choose their code by processor, and each can be made to choose a lesser one's: ATen,
oneDNN, MKL, OpenBLAS, NumPy and glibc's libm by environment variables, vLLM by what `torch.cpu`
reports (tools/machine/sitecustomize.py). The command's subprocesses inherit all of this.
docs/limits.md lists what it does not reach. If this machine already is the one asked for, only the
number of threads is set.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import BadInput
from quantgate.subject.processor import flags

PATCH = Path(__file__).resolve().parent / "machine"
# Read by the patch: prefixes of the names of the features to hide.
HIDDEN = "AS_MACHINE_HIDES"


@dataclass(frozen=True)
class Machine:
    """A processor to imitate."""

    needs: frozenset[str]
    """The flags that a processor needs to imitate it, under Linux's names."""
    hides: tuple[str, ...]
    """Prefixes of the names of features that it lacks, in Linux and torch."""
    settings: Mapping[str, str]
    """The environment variables that restrict libraries accordingly."""


_LATER = ("amx", "avx10", "avx_ne", "avx_vnni", "avx512_bf16", "avx512_fp16", "avx512_vnni")
# One processor class each: Nehalem, Haswell or Zen 3, Skylake-SP. MKL_ENABLE_INSTRUCTIONS has an
# effect on Intel processors only; elsewhere MKL_CBWR chooses, and COMPATIBLE is its lowest value.
MACHINES = {
    "sse41": Machine(
        frozenset({"sse4_1", "sse4_2"}),
        ("amx", "avx", "f16c", "fma"),
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "MKL_CBWR": "COMPATIBLE",
            "OPENBLAS_CORETYPE": "NEHALEM",
            "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-AVX,-FMA,-FMA4",
        },
    ),
    "avx2": Machine(
        frozenset({"avx2", "fma"}),
        ("avx512", *_LATER),
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "MKL_CBWR": "AVX2",
            "OPENBLAS_CORETYPE": "HASWELL",
            "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL",
        },
    ),
    "avx512": Machine(
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        _LATER,
        {
            "ATEN_CPU_CAPABILITY": "avx512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "OPENBLAS_CORETYPE": "SKYLAKEX",
        },
    ),
}
# NumPy's names for the features it has code for beyond its baseline, lowest first.
NUMPY_FEATURES = {
    "sse41": ("AVX", "F16C", "FMA3", "AVX2", "AVX512", "X86_V3", "X86_V4"),
    "avx2": ("AVX512", "X86_V4"),
    "avx512": ("AVX512_CLX", "AVX512_CNL", "AVX512_ICL", "AVX512_SPR"),
}


def environment_of(name: str, threads: int | None, has: frozenset[str]) -> dict[str, str]:
    """Return the variables to run a command as a machine, on a processor that `has` these flags."""
    settings = {} if threads is None else _thread_settings(threads)
    if (machine := MACHINES.get(name)) is None:
        raise BadInput(f"'{name}' is not a machine; choose from {', '.join(MACHINES)}.")
    if missing := sorted(machine.needs - has):
        raise BadInput(
            f"this processor cannot run as {name}: it lacks {', '.join(missing)}, and software can "
            "only hide what a processor has."
        )
    if not any(flag.startswith(machine.hides) for flag in has):
        return settings  # already that machine
    path = os.pathsep.join(filter(None, (str(PATCH), os.environ.get("PYTHONPATH"))))
    compiled = Path(tempfile.gettempdir()) / f"compiled-as-{name}-{os.getuid()}"
    numpy = " ".join(_numpy_features(NUMPY_FEATURES[name]))
    return {
        **settings,
        **machine.settings,
        # These caches' keys do not contain the processor; code for this one would be reused.
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "VLLM_CACHE_ROOT": str(compiled / "vllm"),
        **({"NPY_DISABLE_CPU_FEATURES": numpy} if numpy else {}),
        HIDDEN: " ".join(machine.hides),
        "PYTHONPATH": path,
    }


def _thread_settings(threads: int) -> dict[str, str]:
    """Return the variables that give torch, its libraries and vLLM this number of threads."""
    if threads < 1:
        raise BadInput(f"--threads {threads}: at least 1 is needed.")
    libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys(libraries, str(threads)),
        "MKL_DYNAMIC": "FALSE",  # else MKL, and torch with it, stops at the number of cores
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else vLLM binds one thread to each core
    }


def _numpy_features(hidden: tuple[str, ...]) -> list[str]:
    """Return the features that NumPy would use here and must not; it warns about other names."""
    numpy = importlib.import_module("numpy._core._multiarray_umath")  # there is no public API
    used = (name for name in numpy.__cpu_dispatch__ if numpy.__cpu_features__.get(name))
    return [name for name in used if name.startswith(hidden)]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Run a command as another, lesser processor.")
    parser.add_argument("machine", metavar="MACHINE", help=", ".join(MACHINES))
    parser.add_argument("--threads", type=int, help="1, 2, 4 … (default: as many as it would use)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    return parser.parse_args()


def main() -> int:
    """Replace this process with the command; return 2 on a user error."""
    arguments = parse_arguments()
    command: list[str] = arguments.command
    try:
        settings = environment_of(arguments.machine, arguments.threads, flags())
        os.execvpe(command[0], command, {**os.environ, **settings})
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
