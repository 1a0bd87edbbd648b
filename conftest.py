"""Load the gate's hooks here, not by a `pytest11` entry point.

quantgate is installed in serving environments as a vLLM plugin, where unrelated pytest runs must
not find its options.
"""

pytest_plugins = ("quantgate.pytest_plugin",)
