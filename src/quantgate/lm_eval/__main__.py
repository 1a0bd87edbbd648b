"""`python -m quantgate.lm_eval`: the `lm_eval` command, which then knows the model `quantgate`."""

import sys
from importlib.util import find_spec

from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import EngineFailure


def main() -> int:
    """Run lm-evaluation-harness' own command line; errors of the user are one sentence."""
    if find_spec("lm_eval") is None:
        print(
            'error: lm-evaluation-harness is not installed: pip install "quantgate[lm-eval]".',
            file=sys.stderr,
        )
        return 4
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except EngineFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
