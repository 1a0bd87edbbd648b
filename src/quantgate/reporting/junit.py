"""`junit.xml`: the run for CI pages, with a suite per checkpoint and a case per check."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from quantgate.judging.results import CheckResult

# JUnit's element for each outcome other than pass. A check that did not run is an error, never a
# skip, because CI pages show skips as green. Only a known failure is a skip, like pytest's xfail.
ELEMENT = {"fail": "failure", "inconclusive": "failure", "not-run": "error"}


def junit_xml(results: list[CheckResult]) -> str:
    """Return the report as a JUnit XML document."""
    document = ElementTree.Element("testsuites", name="quantgate")
    for checkpoint in dict.fromkeys(result.checkpoint for result in results):
        own = [result for result in results if result.checkpoint == checkpoint]
        outcomes = [ELEMENT.get(result.verdict.counted) for result in own]
        attributes = {
            "name": checkpoint,
            "tests": str(len(own)),
            "failures": str(outcomes.count("failure")),
            "errors": str(outcomes.count("error")),
        }
        suite = ElementTree.SubElement(document, "testsuite", attributes)
        for result in own:
            _add_case(suite, result)
    ElementTree.indent(document)
    return ElementTree.tostring(document, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ElementTree.Element, result: CheckResult) -> None:
    verdict = result.verdict
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=result.checkpoint,
        name=result.check,
        time=f"{result.seconds:.3f}",
    )
    if verdict.known_failure:
        skipped = ElementTree.SubElement(
            case, "skipped", type="known-failure", message=_printable(verdict.known_failure)
        )
        skipped.text = _printable(verdict.message(f"{result.checkpoint} {result.check}"))
    elif element := ELEMENT.get(verdict.outcome):
        found = ElementTree.SubElement(
            case, element, type=verdict.outcome, message=_printable(verdict.detail)
        )
        found.text = _printable(verdict.message(f"{result.checkpoint} {result.check}"))
    output = ElementTree.SubElement(case, "system-out")
    figures = [*map(str, verdict.deviations), verdict.detail]
    output.text = _printable("\n".join(figures))


def _printable(text: str) -> str:
    """Drop the control characters that XML does not allow, even escaped."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() and c not in "\ufffe\uffff"))
