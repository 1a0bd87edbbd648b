"""Score mode: exact log-probabilities of prompt tokens, computed inside vLLM.

`params` adds the fields, `inputs` checks each request in the caller's process and attaches it,
`prefix_cache` keeps its rows from being skipped, `runner_v1` or `runner_v2` finds them in the
worker, `batch`, `head` and `logprob` compute them, `outputs` hands them back. `hooks` notices what
a vLLM release lacks.
"""
