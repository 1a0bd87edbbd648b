"""Score mode: exact log-probabilities of prompt tokens, computed inside vLLM.

`params` adds the fields. `inputs` checks each request in the caller's process and attaches it.
`prefix_cache` keeps its rows from being served from the cache. `runner_v1` or `runner_v2` finds the
rows in the worker; `batch`, `head` and `logprob` score them; `outputs` returns the scores. `hooks`
installs all of this and detects what a vLLM release lacks.
"""
