"""lm-evaluation-harness' model `quantgate`: log-likelihoods by score mode, text by vLLM.

Importing this package registers the model, so that `simple_evaluate(model="quantgate", …)` finds
it. `python -m quantgate.lm_eval` is the `lm_eval` command with the model registered.
"""

from importlib.util import find_spec

if find_spec("lm_eval") is not None:  # otherwise `python -m quantgate.lm_eval` says how to have it
    from quantgate.lm_eval.model import QuantgateLM

    __all__ = ["QuantgateLM"]
