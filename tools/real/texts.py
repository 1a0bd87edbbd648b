"""Real text, out of pinned packages: prose, other languages, code, documentation, digits, chats."""

import functools
import html
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from real.chats import CHATS
from real.packages import HANDBOOK, MSGSPEC, PYTHON_DOCS, SPHINX, TZDATA, Package, read_members

PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.S)
TITLE = re.compile(r'<h[1-3] class="title">(.*?)</h[1-3]>', re.S)
TAG = re.compile(r"<[^>]+>")
SHORTEST_PARAGRAPH = 200
PAGES = "doc/debian-handbook/html"
LANGUAGES = ("fr-FR", "de-DE", "es-ES")
# Two of the longest chapters.
LONG_PAGES = ("_sources/library/argparse.rst.txt", "_sources/library/stdtypes.rst.txt")


@dataclass(frozen=True)
class Text:
    """A text, where it is from, and a chat's turns if it is one."""

    document: str
    text: str
    chat: tuple[tuple[str, str], ...] = ()


def texts(stratum: str) -> Iterator[Text]:
    """Yield a stratum's texts, the same ones in the same order every time."""
    return STRATA[stratum]()


def _prose() -> Iterator[Text]:
    for page, found in _paragraphs("en-US").items():
        yield Text(f"handbook/en-US/{page}", "\n\n".join(found))


def _languages() -> Iterator[Text]:
    english = {paragraph for found in _paragraphs("en-US").values() for paragraph in found}
    by_language = []
    for language in LANGUAGES:
        pages = {
            page: [paragraph for paragraph in found if paragraph not in english]
            for page, found in _paragraphs(language).items()
        }
        by_language.append(
            [
                Text(f"handbook/{language}/{page}", "\n\n".join(found))
                for page, found in pages.items()
                if found
            ]
        )
    return itertools.chain.from_iterable(zip(*by_language, strict=False))


@functools.cache
def _paragraphs(language: str) -> dict[str, list[str]]:
    """Return the long paragraphs of each page of the handbook."""
    found = {}
    for path, content in _pages(language).items():
        paragraphs = [_plain(raw) for raw in PARAGRAPH.findall(content)]
        long = [text for text in paragraphs if len(text) >= SHORTEST_PARAGRAPH]
        if sum(map(len, long)) > 3 * SHORTEST_PARAGRAPH:
            found[path] = long
    return found


@functools.cache
def _pages(language: str) -> dict[str, str]:
    folder = f"{PAGES}/{language}/"
    return {
        path.split(folder)[1]: content.decode()
        for path, content in _all_pages().items()
        if folder in path
    }


@functools.cache
def _all_pages() -> dict[str, bytes]:
    return read_members(HANDBOOK, ".html")


def _plain(raw: str) -> str:
    return " ".join(html.unescape(TAG.sub("", raw)).split())


def _code() -> Iterator[Text]:
    python = _files(SPHINX, ".py", "sphinx/builders/")
    javascript = _files(SPHINX, ".js", "sphinx/search/non-minified-js/")
    c = itertools.chain(_files(MSGSPEC, ".h", "msgspec/"), _spans(MSGSPEC, "msgspec/_core.c"))
    return itertools.chain.from_iterable(zip(python, javascript, c, strict=False))


def _files(package: Package, suffix: str, folder: str) -> Iterator[Text]:
    for path, content in read_members(package, suffix).items():
        if folder in path and len(content) > 4000:
            yield Text(f"{package.name}/{path}", content.decode())


def _spans(package: Package, suffix: str) -> Iterator[Text]:
    """Yield a very long file in pieces of 40,000 characters, each of which is a document."""
    ((path, content),) = read_members(package, suffix).items()
    whole = content.decode()
    for start in range(0, len(whole), 40000):
        begin = whole.find("\n\n", start) + 2
        yield Text(f"{package.name}/{path}:{begin}", whole[begin : begin + 40000])


def _documentation() -> Iterator[Text]:
    for path, content in read_members(PYTHON_DOCS, ".rst.txt").items():
        if "/howto/" in path or "/tutorial/" in path:
            yield Text(f"python-docs/{path.split('_sources/')[1]}", content.decode())


def _digits() -> Iterator[Text]:
    for a in range(3, 9):
        lines = (f"{a * n} × {n + 7} = {a * n * (n + 7)}" for n in range(11, 60))
        yield Text(f"arithmetic/{a}", "\n".join(lines))
        lines = (f"{n + 0.25 * a:.2f},{(n + 0.25 * a) ** 0.5:.6f}" for n in range(100, 160))
        yield Text(f"roots/{a}", "x,sqrt(x)\n" + "\n".join(lines))
    yield from _spans(TZDATA, "zoneinfo/tzdata.zi")


def _chat() -> Iterator[Text]:
    for number, turns in enumerate(CHATS):
        roles = itertools.cycle(("user", "assistant"))
        chat = tuple(zip(roles, turns, strict=False))
        plain = "\n\n".join(f"{role.capitalize()}: {content}" for role, content in chat)
        yield Text(f"chat/{number:02}", plain, chat)


def _long() -> Iterator[Text]:
    for suffix in LONG_PAGES:
        ((path, content),) = read_members(PYTHON_DOCS, suffix).items()
        yield Text(f"python-docs/{path.split('_sources/')[1]}", content.decode())


STRATA: dict[str, Callable[[], Iterator[Text]]] = {
    "prose": _prose,
    "languages": _languages,
    "code": _code,
    "documentation": _documentation,
    "digits": _digits,
    "chat": _chat,
    "long": _long,
}


def titles() -> Iterator[tuple[Text, Text]]:
    """Yield the title of each section of the handbook, and its first paragraph."""
    for page, paragraphs in _paragraphs("en-US").items():
        if title := TITLE.search(_pages("en-US")[page]):
            name = re.sub(r"^[\d.]+\s*|^Chapter \d+\.\s*", "", _plain(title.group(1)))
            yield Text(f"handbook/{page}", name), Text(f"handbook/{page}", paragraphs[0])
