"""Read the Python sources of a vLLM, installed or in a package index, without importing them.

Of a wheel in an index only the files that are looked at are fetched, where its server answers to
ranges of bytes, and no machine needs a GPU, or the right torch, to read them.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import IO, NamedTuple

Definition = ast.FunctionDef | ast.AsyncFunctionDef
# Gets a path such as "vllm/v1/request.py"; None where there is no such file.
ReadFile = Callable[[str], str | None]


class SourceError(Exception):
    """A version's sources cannot be had; the message says why."""


class Found(NamedTuple):
    """Where a name is defined."""

    module: str
    node: ast.AST


class Sources:
    """The modules of one vLLM, parsed as they are asked for."""

    def __init__(self, version: str, read: ReadFile) -> None:
        self.version = version
        self.read = read
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        """Return a module's source, parsed, with every import's module in full."""
        if module not in self._trees:
            self._trees[module] = self._parse(module)
        return self._trees[module]

    def _parse(self, module: str) -> ast.Module | None:
        path = module.replace(".", "/")
        for file in (f"{path}/__init__.py", f"{path}.py"):
            if (text := self.read(file)) is not None:
                tree = ast.parse(text)
                for node in ast.walk(tree):
                    if isinstance(node, ast.ImportFrom):
                        node.module = _absolute(node, module, is_package="__init__" in file)
                return tree
        return None

    def find(self, module: str, name: str) -> Found | None:
        """Return the definition of a module's name, through imports and re-exports."""
        tree = self.tree(module)
        if tree is None:
            return None
        for node in reversed([*_statements(tree.body)]):
            if name in _names(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom) and (found := self._imported(node, name)):
                return found
        submodule = f"{module}.{name}"
        if (lazy := _lazy_attribute(tree, name)) is not None:
            return self.find(module + lazy.partition(":")[0], lazy.partition(":")[2])
        return Found(submodule, whole) if (whole := self.tree(submodule)) else None

    def _imported(self, node: ast.ImportFrom, name: str) -> Found | None:
        source = node.module or ""
        if not source.startswith("vllm"):
            return None
        for alias in node.names:
            if name == (alias.asname or alias.name) or alias.name == "*":
                return self.find(source, name if alias.name == "*" else alias.name)
        return None

    def member(self, module: str, name: str) -> ast.AST | None:
        """Return what defines "Class.member", in the class or in a base, or a module's "name"."""
        owner_name, _, attribute = name.partition(".")
        found = self.find(module, owner_name)
        if found is None or not attribute:
            return found and found.node
        if not isinstance(found.node, ast.ClassDef):
            return None
        own = [node for node in _class_body(found.node) if attribute in _names(node)]
        if own:
            return own[-1]
        bases = [ast.unparse(base).partition("[")[0] for base in found.node.bases]
        inherited = (self.member(found.module, f"{base}.{attribute}") for base in bases)
        return next((node for node in inherited if node is not None), None)


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts[: len(parts) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Go through a module's statements, those in `if` and `try` blocks included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, field, []))


def _class_body(node: ast.ClassDef) -> Iterator[ast.AST]:
    """Go through a class's definitions, and what its methods assign to `self`."""
    for statement in _statements(node.body):
        if isinstance(statement, Definition):
            yield from (n for n in ast.walk(statement) if isinstance(n, ast.Assign | ast.AnnAssign))
    yield from _statements(node.body)


def _names(node: ast.AST) -> list[str]:
    """Return the names that a statement defines; `self.x = …` defines x."""
    if isinstance(node, Definition | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    every = [
        part
        for target in targets
        for part in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    return [
        part.id if isinstance(part, ast.Name) else part.attr
        for part in every
        if isinstance(part, ast.Name)
        or (isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self")
    ]


def _lazy_attribute(tree: ast.Module, name: str) -> str | None:
    """Return ".module:attribute" where a package lists `name` among those it imports when asked."""
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                if key.value == name and str(value.value).startswith("."):
                    return str(value.value)
    return None


def signature_of(node: Definition) -> Signature:
    """Return a function's parameters without annotations; defaults that are no literal as text."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [
        Parameter(p.arg, Parameter.POSITIONAL_OR_KEYWORD, default=_default(default))
        for p, default in zip(positional, defaults, strict=True)
    ]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    found += [
        Parameter(p.arg, Parameter.KEYWORD_ONLY, default=_default(default))
        for p, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def _default(node: ast.expr | None) -> object:
    if node is None:
        return Parameter.empty
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def installed_sources(version: str) -> Sources:
    """Return the sources of the vLLM in this environment."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SourceError("vLLM is not installed; name the versions to check.")
    root = Path(spec.origin).parent.parent

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return Sources(version, read)


def wheel_sources(version: str | None) -> Sources:
    """Return the sources of a version in pip's index; None is the newest."""
    found = _ask_pip("vllm" if version is None else f"vllm=={version}")
    archive = zipfile.ZipFile(_open_url(found["download_info"]["url"]))
    names = set(archive.namelist())

    def read(path: str) -> str | None:
        return archive.read(path).decode() if path in names else None

    return Sources(found["metadata"]["version"], read)


def _ask_pip(requirement: str) -> dict[str, dict[str, str]]:
    """Return pip's report on the wheel that it would install; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--only-binary=:all:", "--quiet", "--report=-", requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SourceError(f"pip does not find {requirement}: {result.stderr.strip()[-500:]}")
    report: dict[str, list[dict[str, dict[str, str]]]] = json.loads(result.stdout)
    return report["install"][0]


def _open_url(url: str) -> IO[bytes]:
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
    with urllib.request.urlopen(request) as response:
        span = response.headers.get("Content-Range", "")
        if getattr(response, "status", None) == 206 and span:
            return io.BufferedReader(_Ranges(url, int(span.rpartition("/")[2])), 1 << 18)
    whole = tempfile.TemporaryFile()  # a server without ranges, or a file
    with urllib.request.urlopen(url) as response:
        shutil.copyfileobj(response, whole)
    return whole


class _Ranges(io.RawIOBase):
    """A file on a server, read range by range."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        span = {"Range": f"bytes={self._position}-{end - 1}"}
        with urllib.request.urlopen(urllib.request.Request(self._url, headers=span)) as response:
            data = response.read()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
