"""Score mode: exact log-probabilities of prompt tokens, computed inside vLLM.

`params` carries the request to the worker, `runner_v1` finds the rows to score there, `logprob`
computes them, `outputs` hands them back to the caller.
"""
