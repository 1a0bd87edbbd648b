"""`python -m quantgate`: the gate in one line, the audit, and what a machine can certify."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quantgate.atomic import write_atomically
from quantgate.commands import kld as kld_command
from quantgate.commands import ppl as ppl_command
from quantgate.commands import score as score_command
from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.subject.checkpoint_file import read_checkpoint_files

BAD_INPUT = 4  # pytest's own status for it


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line; errors of the user are one sentence."""
    parser = argparse.ArgumentParser(prog="python -m quantgate")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    gate = commands.add_parser(
        "gate",
        help="judge one checkpoint; what follows -- goes to pytest",
        description=_gate.__doc__,
    )
    gate.add_argument("checkpoint", metavar="PATH_OR_ID")
    gate.add_argument("--base", metavar="PATH_OR_ID", help="the unquantized model it was made from")
    gate.add_argument("--report", type=Path, default=Path("report"), metavar="DIR")
    gate.add_argument("pytest", nargs="*", help="pytest's own arguments, after --")
    gate.set_defaults(run=_gate)
    audit = commands.add_parser(
        "audit",
        help="find what is wrong with a checkpoint's files; no engine, no torch",
        description=_audit.__doc__,
    )
    audit.add_argument("checkpoint", nargs="?", metavar="PATH")
    audit.add_argument("--base", metavar="PATH", help="the unquantized model it was made from")
    audit.add_argument(
        "--deep", action="store_true", help="compare every weight with the base's, too"
    )
    audit.add_argument("--json", action="store_true", help="print findings as JSON")
    audit.add_argument("--sarif", type=Path, metavar="FILE", help="also write findings as SARIF")
    audit.add_argument("--rules", action="store_true", help="list the rules")
    audit.add_argument("--explain", metavar="RULE", help="tell what there is to know of a rule")
    audit.set_defaults(run=_audit)
    kld = commands.add_parser(
        "kld", help="KL divergence from the base, on any text", description=_kld.__doc__
    )
    kld.add_argument("model", metavar="PATH_OR_ID")
    kld_command.add_arguments(kld)
    kld.set_defaults(run=_kld)
    ppl = commands.add_parser(
        "ppl", help="perplexity, by a published protocol", description=_ppl.__doc__
    )
    ppl.add_argument("model", metavar="PATH_OR_HUB_ID")
    ppl_command.add_arguments(ppl)
    ppl.set_defaults(run=_ppl)
    score = commands.add_parser(
        "score", help="log-probability and rank of each token", description=_score.__doc__
    )
    score.add_argument("model", metavar="PATH_OR_ID")
    score_command.add_arguments(score)
    score.set_defaults(run=_score)
    budgets = commands.add_parser("budgets", help="print what every check allows, and why")
    budgets.set_defaults(run=_budgets)
    doctor = commands.add_parser("doctor", help="print what this machine can certify")
    doctor.set_defaults(run=_doctor)
    checks = commands.add_parser("checks", help="list every check and what it asks")
    checks.set_defaults(run=_checks)
    for command in (gate, audit, kld, ppl, score, budgets, doctor):
        command.add_argument(
            "--project", type=Path, default=Path.cwd(), help="where suites and fixtures lie"
        )
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except EngineFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _kld(given: argparse.Namespace) -> int:
    """Compare a model's next-token distributions with its base's; needs no gate and no probe."""
    return kld_command.run(given)


def _ppl(given: argparse.Namespace) -> int:
    """Measure the perplexity of a model as vLLM serves it."""
    return ppl_command.run(given)


def _score(given: argparse.Namespace) -> int:
    """Print the log-probability and the rank of each token of a text, as JSON lines."""
    return score_command.run(given)


def _gate(given: argparse.Namespace) -> int:
    """Judge one checkpoint with every suite, and write the report; exits as pytest does."""
    import pytest

    if not (given.project / "suites").is_dir():
        raise BadInput(
            f"{given.project}: no suites here; run it in a clone of quantgate, or give --project."
        )
    report = given.report.absolute()
    options = ["--checkpoint", given.checkpoint, "--gate-report", str(report)]
    if given.base is not None:
        options += ["--base", given.base]
    root = ["--rootdir", str(given.project), "-c", str(given.project / "pyproject.toml")]
    return pytest.main([str(given.project / "suites"), *root, *options, *given.pytest])


def _audit(given: argparse.Namespace) -> int:
    """Look for what is wrong with a checkpoint's files; exits 1 where an error was found."""
    from quantgate.commands import audit

    if given.rules or given.explain:
        print(audit.explain(given.explain) if given.explain else audit.list_rules(), end="")
        return 0
    if given.checkpoint is None:
        raise BadInput("audit needs a checkpoint's directory, or --rules.")
    if given.deep and given.base is None:
        raise BadInput("--deep compares weights with a base's; give --base.")
    base = None if given.base is None else Path(given.base)
    found = audit.run(Path(given.checkpoint), base, deep=given.deep, quiet=given.json)
    if given.sarif is not None:
        write_atomically(given.sarif, audit.to_sarif(found.findings))
    print(audit.to_json(found) if given.json else audit.table(found), end="")
    return 1 if any(finding.severity == "error" for finding in found.findings) else 0


def _budgets(given: argparse.Namespace) -> int:
    from quantgate.reporting.budgets import budgets_table

    print(budgets_table(read_checkpoint_files(given.project).values()), end="")
    return 0


def _checks(given: argparse.Namespace) -> int:
    from quantgate.reporting.checks import checks_list

    print(checks_list(), end="")
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from quantgate.commands import doctor

    known = read_checkpoint_files(given.project)
    print(doctor.report(given.project, known, lambda text: print(f"  {text}", file=sys.stderr)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
