"""`quantgate`, and `python -m quantgate`: the gate, and the commands around it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantgate.atomic import write_atomically
from quantgate.commands import kld as kld_command
from quantgate.commands import ppl as ppl_command
from quantgate.commands import score as score_command
from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.tier import TIERS

BAD_INPUT = 4  # pytest's own status for it

# What `add_subparsers` returns, a class that argparse does not export.
Commands = Any


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status; errors of the user are one sentence."""
    given = parse(arguments)
    try:
        return int(given.run(given))
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, BadInput) else 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, this process's by default; `run` is the function to call with it.

    Words after `--` are pytest's own arguments, for `gate`.
    """
    words, more = _split(sys.argv[1:] if arguments is None else arguments)
    script = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=script if script == "quantgate" else "python -m quantgate",
        description="A release gate for quantized LLM checkpoints served by vLLM.",
        epilog="COMMAND --help tells more of each. To begin: quantgate gate PATH --base BASE",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_gate(commands)
    audit = commands.add_parser(
        "audit",
        help="find what is wrong with a checkpoint's files; no engine, no torch",
        description=_audit.__doc__,
    )
    audit.add_argument("checkpoint", nargs="?", metavar="PATH", help="the checkpoint's directory")
    audit.add_argument("--base", metavar="PATH", help="the unquantized model it was made from")
    audit.add_argument(
        "--deep", action="store_true", help="compare every weight with the base's, too"
    )
    audit.add_argument("--json", action="store_true", help="print findings as JSON")
    audit.add_argument("--sarif", type=Path, metavar="FILE", help="also write findings as SARIF")
    audit.add_argument("--rules", action="store_true", help="list the rules")
    audit.add_argument(
        "--explain", metavar="RULE", help="tell what a rule finds, and why it matters"
    )
    audit.set_defaults(run=_audit)
    _add_measures(commands)
    _add_command(commands, "doctor", _doctor, "print what this machine can certify")
    _add_command(commands, "budgets", _budgets, "print what every check allows, and why")
    _add_command(commands, "checks", _checks, "list every check and what it asks")
    _add_approve(commands)
    _add_merge(commands)
    _add_init(commands)
    _add_card(commands)
    for name in ("gate", "kld", "ppl", "score", "doctor", "budgets", "approve", "merge"):
        commands.choices[name].add_argument(
            "--project",
            type=Path,
            default=Path.cwd(),
            metavar="DIR",
            help="the directory of fixtures/checkpoints and golden (default: this one)",
        )
    given = parser.parse_args(words)
    if more and given.run is not _gate:
        parser.error(f"only `gate` takes words after --, got {' '.join(more)}")
    given.pytest = more
    return given


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--`, and those after it."""
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


def _add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command; `text` is its line in the list and, without a docstring, its description."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=run.__doc__ or f"{text[0].upper()}{text[1:]}."
    )
    command.set_defaults(run=run)
    return command


def _add_gate(commands: Commands) -> None:
    gate = _add_command(
        commands, "gate", _gate, "judge checkpoints with every check, and write the report"
    )
    gate.usage = "%(prog)s [PATH_OR_ID ...] [--base PATH_OR_ID] [options] [-- PYTEST_OPTION ...]"
    gate.epilog = (
        "Words after -- go to pytest: -k quality selects checks, -x stops at the first failure, "
        "-n 2 judges two checkpoints at a time. Exit status: 0 if every check passed, 1 if one "
        "did not, 4 for bad input."
    )
    gate.add_argument(
        "checkpoints",
        nargs="*",
        metavar="PATH_OR_ID",
        help="a directory, a hub id, or the name of a file in fixtures/checkpoints "
        "(default: every file there)",
    )
    gate.add_argument(
        "--base",
        metavar="PATH_OR_ID",
        help="the unquantized model that a checkpoint given by directory or hub id was made from",
    )
    gate.add_argument(
        "--tier",
        choices=TIERS,
        help="how much to ask (default: what a checkpoint's file asks, and standard without one)",
    )
    gate.add_argument(
        "--probe", metavar="NAME_OR_FILE", help="what to score (default: the task's own probe)"
    )
    gate.add_argument(
        "--shard",
        metavar="I/N",
        help="judge every N-th checkpoint, sorted by id, from the I-th on, into "
        "REPORT/shard-I-of-N, for `quantgate merge`; or 'slurm' in a job array",
    )
    gate.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="HOST:PORT",
        help="judge each checkpoint as a task of this Ray, with its GPUs, into one report; "
        "without HOST:PORT the Ray that runs on this machine, 'local' to start one",
    )
    _add_report(gate)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--report",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="where gate.json, gate.md, junit.xml and index.html go (default: report)",
    )


def _add_measures(commands: Commands) -> None:
    kld = _add_command(commands, "kld", _kld, "KL divergence from the base, on any text")
    kld_command.add_arguments(kld)
    ppl = _add_command(commands, "ppl", _ppl, "perplexity, by a published protocol")
    ppl_command.add_arguments(ppl)
    score = _add_command(commands, "score", _score, "log-probability and rank of each token")
    score_command.add_arguments(score)
    for command in (kld, ppl, score):
        command.add_argument(
            "model",
            metavar="PATH_OR_ID",
            help="a directory, a hub id, or the name of a file in fixtures/checkpoints",
        )


def _add_approve(commands: Commands) -> None:
    approve = _add_command(
        commands, "approve", _approve, "take what a checkpoint computes now as its golden"
    )
    selection = approve.add_mutually_exclusive_group(required=True)
    selection.add_argument(
        "--checkpoint",
        action="append",
        metavar="ID",
        help="the name of a file in fixtures/checkpoints; may be repeated",
    )
    selection.add_argument(
        "--all", action="store_true", help="every checkpoint, unless its file says golden = false"
    )
    approve.add_argument(
        "--reason", required=True, metavar="TEXT", help="kept in the golden's history"
    )
    approve.add_argument(
        "--dry-run", action="store_true", help="show what would change, write none"
    )
    approve.add_argument(
        "--accept-failing",
        action="store_true",
        help="approve what fails fidelity too; the golden's history says so",
    )


def _add_merge(commands: Commands) -> None:
    merge = _add_command(
        commands, "merge", _merge, "make one report of what `gate --shard I/N` has written"
    )
    merge.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="what a shard has written, such as report/shard-1-of-3",
    )
    _add_report(merge)


def _add_init(commands: Commands) -> None:
    init = _add_command(commands, "init", _init, "make a repository for checkpoints to gate")
    init.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to write (default: here); it is made if need be",
    )


def _add_card(commands: Commands) -> None:
    card = _add_command(commands, "card", _card, "write a model card's section from a report")
    card.add_argument(
        "report", type=Path, metavar="REPORT_DIR", help="where `quantgate gate` wrote gate.json"
    )
    card.add_argument(
        "--checkpoint", metavar="ID", help="which one, if the report is of several checkpoints"
    )
    card.add_argument(
        "--base",
        metavar="ORG/MODEL",
        help="the base's id on the hub, where the report names a directory",
    )
    card.add_argument(
        "--name", help="the model's name in the metadata (default: the checkpoint's id)"
    )


def _gate(given: argparse.Namespace) -> int:
    """Judge checkpoints with every check, print a table and write the report."""
    from quantgate.commands import gate

    if given.ray is not None and given.shard is not None:
        raise BadInput("--ray makes a shard of each checkpoint; leave out --shard.")
    more = [
        word
        for option in ("tier", "probe", "shard")
        if (value := getattr(given, option)) is not None
        for word in (f"--{option}", value)
    ]
    asked = gate.Asked(
        given.project, given.checkpoints, given.base, given.report, [*more, *given.pytest]
    )
    if given.ray is not None:
        from quantgate.commands import on_ray

        return on_ray.run(asked, given.ray)
    return gate.run(asked)


def _kld(given: argparse.Namespace) -> int:
    """Compare a model's next-token distributions with those of its base, on any text.

    Prints llama.cpp's statistics of the KL divergence. Needs no checkpoint file and no golden.
    """
    return kld_command.run(given)


def _ppl(given: argparse.Namespace) -> int:
    """Measure the perplexity of a model as vLLM serves it."""
    return ppl_command.run(given)


def _score(given: argparse.Namespace) -> int:
    """Print the log-probability and the rank of each token of a text, a JSON object a line."""
    return score_command.run(given)


def _approve(given: argparse.Namespace) -> int:
    """Take what a checkpoint computes now as its golden, which `drift` compares with from then on.

    Shows old and new figures first. A golden that still holds is not rewritten, and a checkpoint
    that fails fidelity is refused.
    """
    from quantgate.commands import approve

    asked = approve.Approval(given.reason, given.dry_run, given.accept_failing)
    return approve.run(given.project, given.checkpoint, asked)


def _merge(given: argparse.Namespace) -> int:
    """Make one report of several shards; exits 0 only if all are there and every check passed.

    The checkpoints of a missing shard are reported as not run.
    """
    from quantgate.commands import merge

    return merge.run(given.directories, given.project, given.report)


def _init(given: argparse.Namespace) -> int:
    """Write an example of a checkpoint's file, an empty golden/ and a CI workflow.

    Nothing that is there already is overwritten.
    """
    from quantgate.commands import init

    for path in init.run(given.directory):
        print(f"wrote {path}")
    print(init.NEXT)
    return 0


def _card(given: argparse.Namespace) -> int:
    """Write card.md and badge.svg into REPORT_DIR: the verdict, recoveries with ±, and metadata.

    card.md begins with the metadata that the hub reads (base_model, base_model_relation,
    model-index), between two lines of ---; merge it into your README.md's.
    """
    from quantgate.reporting.card import write_card

    paths = write_card(given.report, checkpoint=given.checkpoint, base=given.base, name=given.name)
    for path in paths:
        print(f"wrote {path}")
    return 0


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
