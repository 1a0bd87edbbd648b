"""The `vllm.general_plugins` entry point: what quantgate adds to vLLM, and when.

vLLM loads this entry point in every process it starts (engine core, workers), possibly more than
once. `import quantgate` calls it as well, so a plain script needs nothing else. Each patch is
applied when its module is imported, so registering costs nothing if vLLM is not used.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import wrapt

from quantgate.patches import emulation, loading, pooling_api
from quantgate.patches.scoremode import inputs, outputs, params, prefix_cache, runner_v1, runner_v2
from quantgate.patches.scoremode.hooks import (
    EMULATION,
    HOOKS,
    POOLING,
    SCORE_MODE,
    guarded,
    install_hooks,
)

# Importing each of these declares its hooks.
HOOKED = (
    inputs,
    outputs,
    params,
    prefix_cache,
    runner_v1,
    runner_v2,
    pooling_api,
    emulation,
    loading,
)

# Patches other than hooks, by module: the feature, and a function that takes the module.
PATCHES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "vllm.outputs": (POOLING, pooling_api.patch_outputs),
    "vllm.sampling_params": (SCORE_MODE, params.patch_sampling_params),
    "vllm.model_executor.kernels.linear": (EMULATION, emulation.register_kernels),
}


@functools.cache
def register() -> None:
    """Arrange for every hook and patch to be applied once, when its module is imported."""
    for module_name, (feature, patch) in PATCHES.items():
        wrapt.register_post_import_hook(guarded(feature, patch), module_name)
    for module_name in {hook.module for hook in HOOKS}:
        wrapt.register_post_import_hook(guarded(SCORE_MODE, install_hooks), module_name)
