"""`quantgate init`: a repository for checkpoints to gate, in a directory of the user's."""

from __future__ import annotations

from pathlib import Path

from quantgate.errors import BadInput

TEMPLATES = Path(__file__).with_name("new_project")
# What is written, and from which template. Git keeps no empty folder.
FILES = {
    "fixtures/checkpoints/example.toml.sample": "example.toml.sample",
    "golden/.gitkeep": None,
    ".github/workflows/quantgate.yml": "workflow.yml",
}
NEXT = (
    "Next: copy fixtures/checkpoints/example.toml.sample to <id>.toml there, change it, and run "
    "`quantgate gate`."
)


def run(directory: Path) -> list[Path]:
    """Write the files of a new repository; return their paths.

    Raises `BadInput`, and writes nothing, if one of them is there already.
    """
    for name in FILES:
        if (directory / name).exists():
            raise BadInput(
                f"{directory / name}: it is there already, and init overwrites nothing; give "
                "another directory, or remove it."
            )
    for name, template in FILES.items():
        path = directory / name
        text = "" if template is None else (TEMPLATES / template).read_text(encoding="utf-8")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise BadInput(f"{path}: it cannot be written ({error.strerror}).") from None
    return [directory / name for name in FILES]
