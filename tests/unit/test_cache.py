"""What lies on disk: the cache, verified and shared; what nobody reads or owns any more goes."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.atomic import write_atomically
from quantgate.measuring import cache
from quantgate.measuring.cache import DAYS_KEPT, DamagedEntry, DiskCache
from quantgate.measuring.scratch import remove_leftovers, scratch_directory

KEY = {"identity": "abc", "dtype": "float32"}
ARRAYS = {
    "logprob": np.linspace(-9, 0, 50, dtype=np.float32),
    "top1": np.arange(50, dtype=np.int32),
}


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_bit_anywhere_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = DiskCache(tmp_path_factory.mktemp("cache"))
    cache.write(KEY, ARRAYS)
    content = bytearray(cache.path(KEY).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    cache.path(KEY).write_bytes(content)
    try:
        found = cache.read(KEY)
    except DamagedEntry:
        return
    # What may still be read is what was written: a bit of the padding, e.g.
    assert found is not None
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in ARRAYS.items()}


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_cut_off_entry_is_noticed(tmp_path: Path, length: int) -> None:
    cache = DiskCache(tmp_path)
    cache.write(KEY, ARRAYS)
    cache.path(KEY).write_bytes(cache.path(KEY).read_bytes()[:length])
    with pytest.raises(DamagedEntry):
        cache.read(KEY)


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        DiskCache(tmp_path).write(KEY, ARRAYS)
    assert list(tmp_path.iterdir()) == []
    assert DiskCache(tmp_path).read(KEY) is None


def test_an_entry_under_anothers_name_is_not_its(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write(KEY, ARRAYS)
    other = {**KEY, "dtype": "float64"}
    cache.path(KEY).rename(cache.path(other))
    with pytest.raises(DamagedEntry, match="not what was written"):
        cache.read(other)


HOLD = """
import sys
from pathlib import Path
from quantgate.measuring.cache import DiskCache

with DiskCache(Path(sys.argv[1])).alone({"identity": "abc", "dtype": "float32"}, lambda: None):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_who_waits_says_so_and_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    waited: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"

        def waiting() -> None:
            waited.append("for it")
            other.kill()

        with DiskCache(tmp_path).alone({**KEY, "dtype": "float64"}, waiting):
            assert not waited  # another entry is nobody's
        with DiskCache(tmp_path).alone(KEY, waiting):
            assert waited == ["for it"]


def age(path: Path, days: float) -> None:
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))


def test_what_nobody_reads_goes_and_nothing_else(tmp_path: Path) -> None:
    cache, unread = DiskCache(tmp_path), {**KEY, "dtype": "float64"}
    for key in (KEY, unread):
        cache.write(key, ARRAYS)
        with cache.alone(key, lambda: None):
            pass
    (tmp_path / "notes.safetensors").write_text("somebody's own")
    (tmp_path / f".{cache.path(KEY).name}.x1y2").write_text("what a killed process left")
    for path in tmp_path.iterdir():
        age(path, DAYS_KEPT + 1)
    assert cache.read(KEY) is not None
    cache.forget_unused()
    assert {path.name for path in tmp_path.iterdir()} == {
        cache.path(KEY).name, "notes.safetensors"
    }  # fmt: skip
    assert cache.read(unread) is None
    DiskCache(tmp_path / "nothing").forget_unused()


def test_what_a_killed_process_left_of_a_write_goes_with_the_next(tmp_path: Path) -> None:
    left, recent, others = (
        tmp_path / name for name in (".a[1].json.x", ".a[1].json.y", ".a1.json.x")
    )
    for path in (left, recent, others):
        path.write_text("half")
    age(left, 0.1)
    age(others, 0.1)
    write_atomically(tmp_path / "a[1].json", "whole")
    assert not left.exists()
    assert recent.exists()  # being written, by another
    assert others.exists()


SCRATCH = """
import os, signal
from quantgate.measuring.scratch import scratch_directory

class Owner: pass

owner = Owner()
print(scratch_directory(owner), flush=True)
if {killed}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_captures_of_a_process_go_with_it_even_if_it_was_killed(
    tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH.format(killed=killed)], capture_output=True, text=True
    )
    left = Path(done.stdout.strip())
    assert left.parent == tmp_path
    assert left.exists() == killed

    class Owner:
        pass

    owner = Owner()
    ours = scratch_directory(owner)
    assert left.exists() == killed  # it may be of one that just begins
    own = tmp_path / "quantgate-of-somebody"
    own.mkdir()
    for path in tmp_path.iterdir():
        age(path, 1)
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {ours, own}
    del owner
    gc.collect()
    assert not ours.exists()


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("formats/weights.py", True),
        ("measuring/streamed_model.py", True),
        ("patches/scoremode/batch.py", True),
        ("subject/probe.py", True),
        ("reporting/html.py", False),
        ("judging/checks.py", False),
        ("plugin/selection.py", False),
    ],
)
def test_what_measures_makes_entries_stale_and_nothing_else(
    root: Path, tmp_path: Path, changed: str, stale: bool
) -> None:
    """No room that measures imports one that does not: `make lint` holds that."""
    package = shutil.copytree(root / "src" / "quantgate", tmp_path / "quantgate")
    assert cache._digest_of(package) == cache.code_version()
    with (package / changed).open("a") as stream:
        stream.write("\n# changed\n")
    assert (cache._digest_of(package) != cache.code_version()) is stale
