"""Quantgate: a release gate for quantized LLM checkpoints served by vLLM.

Importing this package gives vLLM its score mode (`SamplingParams(score_mode=True)`). The import
itself is light: the patches are applied when vLLM's modules are imported.
"""

from quantgate.vllm_plugin import register

__all__ = ["__version__"]
__version__ = "0.1.0"

register()
