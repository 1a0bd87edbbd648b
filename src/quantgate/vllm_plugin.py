"""The `vllm.general_plugins` entry point: what quantgate adds to vLLM, and when.

vLLM loads this entry point in every process it starts (engine core, workers), possibly more than
once; `import quantgate` calls it as well, so that a plain script needs nothing else. Each patch
waits for the module it belongs to, so registering costs nothing where vLLM is not used.
"""

from collections.abc import Callable
from types import ModuleType

import wrapt

from quantgate import emulation, pooling_api
from quantgate.scoremode import inputs, outputs, params, prefix_cache, runner_v1, runner_v2
from quantgate.scoremode.hooks import V1_RUNNER, V2_RUNNER

COMPRESSED_TENSORS = "vllm.model_executor.layers.quantization.compressed_tensors"


def _patch_compressed_tensors(module: ModuleType) -> None:
    pooling_api.patch_quantization(module)
    emulation.on_cpu(emulation.patch_compressed_tensors)(module)


# The vLLM modules that are patched, each by one function that gets the imported module.
PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "vllm.outputs": pooling_api.patch_outputs,
    "vllm.entrypoints.llm": pooling_api.patch_llm,
    "vllm.sampling_params": params.patch_sampling_params,
    "vllm.entrypoints.openai.completion.protocol": params.patch_completion_request,
    "vllm.renderers.base": inputs.patch_renderer,
    "vllm.v1.engine.input_processor": inputs.patch_input_processor,
    "vllm.v1.core.kv_cache_manager": prefix_cache.patch_kv_cache_manager,
    "vllm.v1.engine.logprobs": outputs.patch_logprobs_processor,
    "vllm.v1.engine.output_processor": outputs.patch_output_processor,
    V1_RUNNER: runner_v1.patch_model_runner,
    V2_RUNNER: runner_v2.patch_prompt_logprobs_worker,
    f"{COMPRESSED_TENSORS}.compressed_tensors": _patch_compressed_tensors,
    **{
        module: emulation.on_cpu(patch)
        for module, patch in {
            "vllm._custom_ops": emulation.patch_custom_ops,
            "vllm.model_executor.kernels.linear": emulation.register_kernels,
            "vllm.model_executor.layers.linear": emulation.patch_unquantized_linear,
            "vllm.model_executor.layers.attention.attention": emulation.patch_attention,
            f"{COMPRESSED_TENSORS}.schemes.compressed_tensors_w4a4_nvfp4": (
                emulation.patch_nvfp4_scheme
            ),
        }.items()
    },
}

_registered = False


def register() -> None:
    """Arrange for every patch to be applied once, when its module is imported."""
    global _registered
    if _registered:
        return
    _registered = True
    for module_name, patch in PATCHES.items():
        wrapt.register_post_import_hook(patch, module_name)
