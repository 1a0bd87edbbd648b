"""A companion of torch that breaks transformers is named before anything is loaded."""

from pathlib import Path

import pytest

from quantgate.commands import companions
from quantgate.errors import BadInput


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that this process and those it starts find first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, version: str, text: str = "") -> None:
    (folder / f"{name}.py").write_text(text)
    (info := folder / f"{name}-{version}.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


BREAKS = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.mark.parametrize(
    ("torch", "torchvision", "text", "broken"),
    [
        ("2.13.0+cpu", "0.28.0", BREAKS, ["torchvision"]),
        ("2.13.0+cpu", "0.28.0", "", []),
        ("2.13.0+cpu", "0.28.0+cpu", BREAKS, []),  # it fits, and is not imported to find out
        ("2.13.0", "0.28.0", BREAKS, []),
    ],
)
def test_what_does_not_import_is_found(
    packages: Path, torch: str, torchvision: str, text: str, broken: list[str]
) -> None:
    install(packages, "torch", torch)
    install(packages, "torchvision", torchvision, text)
    assert companions.broken() == broken
    if broken:
        with pytest.raises(BadInput, match="run `pip uninstall -y torchvision`"):
            companions.require()
    else:
        companions.require()
