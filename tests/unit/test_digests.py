"""Digests of large files are kept, and never believed of a file that has changed."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from quantgate.subject import digests


@pytest.fixture(autouse=True)
def small_files_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "KEPT_FROM", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    honest = digests._computed

    def noted(path: Path) -> str:
        names.append(path.name)
        return honest(path)

    monkeypatch.setattr(digests, "_computed", noted)
    return names


def digest_in_a_new_process(path: Path) -> str:
    digests._once.cache_clear()
    return digests.sha256_of([path])[path]


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, computed: list[str]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 64)
    for _ in range(3):
        assert digest_in_a_new_process(path) == hashlib.sha256(b"a" * 64).hexdigest()
    assert computed == ["weights"]
    # Of the same size, and dated back to when the first was written.
    before = path.stat()
    path.write_bytes(b"b" * 64)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_in_a_new_process(path) == hashlib.sha256(b"b" * 64).hexdigest()
    assert computed == ["weights", "weights"]


@pytest.mark.parametrize("damage", ["", "[]", '{"version": 1}', '{"sha256": 1, "version": []}'])
def test_a_damaged_cache_is_computed_anew(tmp_path: Path, computed: list[str], damage: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 64)
    digest_in_a_new_process(path)
    (kept,) = (tmp_path / "cache" / "quantgate" / "sha256").iterdir()
    kept.write_text(damage)
    assert digest_in_a_new_process(path) == hashlib.sha256(b"a" * 64).hexdigest()
    assert len(computed) == 2
    assert json.loads(kept.read_text())["sha256"] == hashlib.sha256(b"a" * 64).hexdigest()


def test_where_nothing_can_be_kept_it_is_computed(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 64)
    for _ in range(2):
        assert digest_in_a_new_process(path) == hashlib.sha256(b"a" * 64).hexdigest()
    assert len(computed) == 2
