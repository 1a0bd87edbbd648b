"""`quantgate doctor` names what is missing, and the kernel of each format."""

import re
from pathlib import Path


def test_the_doctor_says_what_is_certified_and_what_is_missing(tmp_path: Path) -> None:
    from quantgate.commands import doctor
    from quantgate.subject.checkpoint import Checkpoint

    known = {"x": Checkpoint("x", "./build/x", "W4A16", root=tmp_path)}
    assert doctor.missing(tmp_path, known)[0].endswith("are not built: run `make checkpoints`")
    (found,) = doctor.format_kernels(known)
    assert (found.scheme, found.certifies) == ("W4A16", False)
    assert "no such directory" in found.kernels
    assert doctor.machine()["vllm"] != "not installed"
    assert doctor.cache_state(tmp_path) == f"{tmp_path}: 0 measurements, 0 MiB"


def test_the_doctor_names_the_kernel_of_a_format(root: Path) -> None:
    """By loading it; one format, of which every build says something."""
    from quantgate.commands import doctor
    from quantgate.subject.checkpoint_file import read_checkpoint_files

    known = read_checkpoint_files(root)
    text = doctor.report(root, {"tiny-llama": known["tiny-llama"]}, lambda _: None)
    assert re.search(r"^none +yes +UnquantizedLinearMethod$", text, re.MULTILINE)
