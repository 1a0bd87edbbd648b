"""A badge for a model card: an SVG of two fields, a name and what is said of it."""

from __future__ import annotations

from xml.etree import ElementTree

from quantgate.judging.verdict import Outcome

COLOR: dict[Outcome, str] = {
    "pass": "#2e7d32",
    "fail": "#b3261e",
    "inconclusive": "#8a6100",
    "not-run": "#5f6368",
}
NAME_COLOR = "#444444"
HEIGHT = 20
# Enough for a character of the font below at its widest, on average, and for both margins.
PER_CHARACTER, MARGINS = 7, 12
LONGEST = 60


def badge(name: str, said: str, outcome: Outcome) -> str:
    """Return an SVG document; the texts are escaped, and cut at `LONGEST` characters."""
    name, said = _shown(name), _shown(said)
    widths = [len(text) * PER_CHARACTER + MARGINS for text in (name, said)]
    document = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        width=str(sum(widths)),
        height=str(HEIGHT),
        role="img",
    )
    ElementTree.SubElement(document, "title").text = f"{name}: {said}"
    begins = 0
    for text, width, color in zip((name, said), widths, (NAME_COLOR, COLOR[outcome]), strict=True):
        field = {"x": str(begins), "width": str(width), "height": str(HEIGHT), "fill": color}
        ElementTree.SubElement(document, "rect", field)
        place = {"x": str(begins + width // 2), "y": "14", "fill": "#ffffff"}
        font = {"text-anchor": "middle", "font-family": "Verdana, sans-serif", "font-size": "11"}
        ElementTree.SubElement(document, "text", place | font).text = text
        begins += width
    return ElementTree.tostring(document, encoding="unicode") + "\n"


def _shown(text: str) -> str:
    return "".join(
        c if c.isprintable() and c not in "\ufffe\uffff" else "?" for c in text[:LONGEST]
    )
