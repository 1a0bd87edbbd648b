"""tools/check_vllm.py finds what a vLLM lacks, by reading; and this one lacks nothing."""

import http.server
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantgate.patches.scoremode.hooks import vllm_version

CACHE = "vllm/v1/core/kv_cache_manager.py"
BLOCKS = "def get_computed_blocks(self, request: Request)"
RENDERER = "vllm/renderers/base.py"
LOGPROBS = "vllm/v1/engine/logprobs.py"


@pytest.fixture(scope="module")
def check(tool: Callable[[str], ModuleType], root: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "tools"))  # for vllm_sources, which the script imports
        return tool("check_vllm")


@pytest.fixture(scope="module")
def installed(check: Any) -> Any:
    return check.installed_sources(vllm_version())


def altered(check: Any, installed: Any, file: str, old: str, new: str) -> Any:
    """The installed vLLM with one file changed."""
    text = installed.read(file)
    assert old in text
    changed = check.Sources("9.9.9", lambda path: text.replace(old, new))
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = changed.tree(module)
    changed.tree = lambda name: tree if name == module else installed.tree(name)
    return changed


def test_the_installed_vllm_has_all_that_is_touched(
    check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([]) == 0
    total = len(check.touched())
    assert capsys.readouterr().out == f"vLLM {vllm_version()}: {total} of {total} fit\n"


def test_hooks_attributes_and_imports_are_looked_at(check: Any) -> None:
    looked_at = {(item.module, item.name, item.hook is not None) for item in check.touched()}
    assert looked_at > {
        ("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_computed_blocks", True),
        ("vllm._custom_ops", "scaled_fp8_quant", True),
        ("vllm.v1.request", "Request.num_tokens", False),
        ("vllm", "LLM", False),
        ("vllm.v1.outputs", "LogprobsTensors", False),
    }


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (CACHE, "def get_computed_blocks(", "def cached_blocks(", ["missing"]),
        (CACHE, BLOCKS, BLOCKS.replace("request", "asked"), ["(asked)"]),
        (CACHE, BLOCKS, BLOCKS.replace(")", ", m: int = 0)"), ["(request, m=0)"]),
        (CACHE, BLOCKS, BLOCKS.replace(")", ", max_cache_hit_length=None, *, m: int = 0)"), []),
        (
            RENDERER,
            "    async def _process_tokens_async(",
            "    def _process_tokens_async(",
            ["async"],
        ),
        (LOGPROBS, "    @classmethod\n    def from_new", "    def from_new", ["another kind"]),
        (LOGPROBS, "_verify_tokens", "_corrected", ["_verify_tokens: missing"]),
        ("vllm/logprobs.py", "class Logprob", "class Logprobability", ["Logprob: missing"]),
        ("vllm/v1/request.py", "def num_tokens(", "def tokens(", ["Request.num_tokens: missing"]),
        ("vllm/__init__.py", "LLM", "Engine", ["vllm.LLM: missing"]),
    ],
)
def test_what_a_version_has_otherwise_is_named(
    check: Any, installed: Any, file: str, old: str, new: str, said: list[str]
) -> None:
    problems = check.problems(altered(check, installed, file, old, new))
    assert len(problems) == len(said)
    assert all(part in line for part, line in zip(said, problems, strict=True)), problems


def test_a_new_parameter_is_shown_where_it_came(check: Any, installed: Any) -> None:
    changed = altered(
        check,
        installed,
        CACHE,
        BLOCKS,
        BLOCKS.replace(")", ", max_cache_hit_length=None, *, more=0)"),
    )
    cells = {row[0]: row[3:] for row in check.rows([installed, changed])}
    name = "`vllm.v1.core.kv_cache_manager` `KVCacheManager`"
    assert cells[name][0] == "✓"
    assert cells[name][1].startswith("✓; `get_computed_blocks` +max_cache_hit_length, +more")


def test_the_page_is_what_the_tool_writes(check: Any, installed: Any, root: Path) -> None:
    """Of the versions that the extras allow; its column of the installed one is computed again."""
    page = (root / "docs" / "vllm-versions.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in page.splitlines()
            if line.startswith("| ")]  # fmt: skip
    headings, rows = rows[0], rows[2:]
    assert headings[3:] == [f"0.{minor}.0" for minor in range(26, 34)]
    column = headings.index(vllm_version())
    expected = list(check.rows([installed]))
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    assert [row[column].partition(";")[0] for row in rows] == [row[3] for row in expected]
    assert not [cell for row in rows for cell in row[3:] if not cell.startswith("✓")]
    assert f"    {check.COMMAND} --markdown {' '.join(headings[3:])}\n" in page


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A vLLM 9.9.9 with one module."""
    path = tmp_path / "vllm-9.9.9-py3-none-any.whl"
    about = "vllm-9.9.9.dist-info"
    files = {
        "vllm/__init__.py": "from .logprobs import *\n",
        # Fits by the one name it has, and by two optional hooks' methods, which may be missing.
        "vllm/logprobs.py": "class Logprob:\n    logprob = 0\n",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize("version", ["newest", "9.9.9"])
def test_a_wheel_that_pip_finds_is_read(
    check: Any,
    wheel: Path,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert check.main([version]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"vLLM 9.9.9: 3 of {len(check.touched())} fit\n")
    assert "vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks(request" in said
    assert "vllm.logprobs.Logprob" not in said


def test_a_version_that_is_not_there_is_said(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert check.main(["0.99.0"]) == 2
    assert capsys.readouterr().err.startswith("pip does not find vllm==0.99.0: ")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file, in ranges where it is asked for them and knows of them."""

    def __init__(self, content: bytes, ranges: bool, sent: list[int], *arguments: Any) -> None:
        self.content, self.ranges, self.sent = content, ranges, sent
        super().__init__(*arguments)

    def do_GET(self) -> None:
        body, span = self.content, self.headers.get("Range")
        self.send_response(206 if span and self.ranges else 200)
        if span and self.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            body = body[int(first) : int(last) + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        self.sent.append(len(body))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            pass  # the client had seen enough

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture(params=[True, False], ids=["ranges", "whole"])
def served(request: pytest.FixtureRequest, wheel: Path) -> Iterator[tuple[str, list[int], bool]]:
    """The wheel on a server, with 4 MB that nobody needs in it."""
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("vllm/_C.so", bytes(4_000_000))
    sent: list[int] = []
    handler = partial(Server, wheel.read_bytes(), request.param, sent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/vllm.whl", sent, request.param
        server.shutdown()


def test_only_what_is_read_is_fetched(
    tool: Callable[[str], ModuleType], served: tuple[str, list[int], bool]
) -> None:
    url, sent, ranges = served
    with zipfile.ZipFile(tool("vllm_sources")._open_url(url)) as archive:
        assert archive.read("vllm/logprobs.py").startswith(b"class Logprob")
    assert (sum(sent) < 1_500_000) == ranges


def test_a_kernel_that_has_no_rule_is_named(check: Any, installed: Any) -> None:
    assert check.without_rule(installed) == []
    file = "vllm/model_executor/kernels/linear/__init__.py"
    newer = altered(check, installed, file, "        MacheteLinearKernel,", "        Turbo,")
    assert check.without_rule(newer) == ["Turbo"]
    assert "  Turbo: no rule in quantgate/formats/kernels.py" in check.problems(newer)
