"""Kernels for formats that this machine's vLLM build lacks; always visible in the verdict.

vLLM's own loading, sharding and fusing of q/k/v still run, which is where most real bugs live: only
the product is emulated. An emulated kernel never counts as evidence about the real one.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The key in vLLM's `additional_config`, which reaches every process of an engine.
ADDITIONAL_CONFIG_KEY = "quantgate"
PORTABLE = "portable"
NATIVE = "native"


def is_emulated(kernel: object) -> bool:
    """Whether a vLLM kernel object computes in floating point on dequantized weights."""
    return bool(getattr(kernel, "emulated", False)) or type(kernel).__name__.startswith("Emulation")


def register_kernels(module: ModuleType) -> None:
    """Offer the dequantizing W4A16 / W8A16 kernel to vLLM's choice of kernels on CPU."""
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_quantized_values_into_int32,
    )
    from vllm.platforms import PlatformEnum

    class DequantizingLinearKernel(MPLinearKernel):  # type: ignore[misc]
        """Integer weights dequantized once, after loading; then a plain product."""

        emulated = True

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            if _kernels_wanted() == NATIVE and _has_native_wna16(c.act_type):
                return False, "this build has a kernel of its own"
            if 32 % c.weight_type.size_bits:
                return False, f"{c.weight_type} does not divide 32 bits"
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            import torch

            packed, scale, zero_point = self._get_weight_params(layer)
            weight_type = self.config.weight_type
            # [out, in]: the checkpoint's layout, packed along the input dimension.
            code = unpack_quantized_values_into_int32(packed, weight_type, packed_dim=1)
            if zero_point is None:
                offset = torch.full_like(scale, weight_type.bias)
            else:
                offset = unpack_quantized_values_into_int32(zero_point, weight_type, packed_dim=0)
            weight = dequantize_groups(code, scale, offset)
            # The product reads `weight`; the packed form would only hold memory.
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
                if name is not None and hasattr(layer, name):
                    delattr(layer, name)

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            import torch

            weight = layer.get_parameter("weight")
            return torch.nn.functional.linear(x, weight, bias)

    # First, not last: vLLM's CPU kernel claims builds in which its operator does not exist.
    module._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, DequantizingLinearKernel)


def dequantize_groups(
    code: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Return (code - offset) * scale in scale's dtype, rounded once.

    `code` int [out, in]; `scale` and `offset` [out, groups], each group `in / groups` columns.
    """
    out, columns = code.shape
    groups = scale.shape[1]
    centred = code.view(out, groups, columns // groups) - offset.int().unsqueeze(2)
    return (centred.float() * scale.float().unsqueeze(2)).to(scale.dtype).view(out, columns)


def _kernels_wanted() -> str:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    wanted = ((config and config.additional_config) or {}).get(ADDITIONAL_CONFIG_KEY, {})
    return str(wanted.get("kernels", NATIVE))


def _has_native_wna16(activations: torch.dtype) -> bool:
    """Whether vLLM's own kernel runs: AVX-512 builds have it, for 16-bit activations only."""
    import torch

    return hasattr(torch.ops._C, "cpu_gemm_wna16") and activations != torch.float32
