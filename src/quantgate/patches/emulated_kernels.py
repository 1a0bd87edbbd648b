"""The emulated kernels: dequantize, multiply in float32, and round once to the input's dtype.

Import this after vLLM's kernels and before its layers, which import kernels. Inputs are quantized
by vLLM's own code if it has any for the CPU, and by the format's definition otherwise. Products of
16-bit numbers are exact in float32, so a float32 matrix product differs from a 16-bit one only in
the precision of its sums. It is also the same on every processor, and a 16-bit one is ten times
slower without AVX512-BF16.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4 import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm import (
    CPUInt8ScaledMMLinearKernel,
    Fp8BlockScaledMMLinearKernel,
    FP8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import (
    MXFP8_BLOCK_SIZE,
    dequant_mxfp8_to_bf16,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    unpack_quantized_values_into_int32,
)

from quantgate.formats.activations import NVFP4_GROUP
from quantgate.formats.numbers import decode_e2m1, decode_e8m0
from quantgate.patches.wanted import portable_wanted, static_fp8_is_missing

E4M3 = torch.float8_e4m3fn


class DequantizingLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """Integer weights (W4A16, W8A16, W4AFP8), dequantized once after loading."""

    emulated = True

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: any machine is supported."""
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Decline if the build has a working native kernel, unless portable is requested."""
        if not portable_wanted() and _has_native_wna16(c):
            return False, "this build has a native kernel"
        if 32 % c.weight_type.size_bits:
            return False, f"{c.weight_type} does not divide 32 bits"
        if getattr(c, "has_g_idx", False):
            return False, "act-order (g_idx) is not emulated"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed weight with `weight` [out, in] in the dtype of the product."""
        # vLLM 0.26 also returns the column order, which is None because of `can_implement`.
        packed, scale, zero_point, *_ = self._get_weight_params(layer)
        weight_type = self.config.weight_type
        # [out, in]: the checkpoint's layout, packed along the input dimension.
        code = unpack_quantized_values_into_int32(packed, weight_type, packed_dim=1)
        if zero_point is None:
            # Stored unsigned, whatever vLLM calls the type, e.g. int4 for W4AFP8.
            offset = torch.full_like(scale, 1 << (weight_type.size_bits - 1), dtype=torch.int32)
        else:
            offset = unpack_quantized_values_into_int32(zero_point, weight_type, packed_dim=0)
        weight = dequantize_groups(code, scale, offset)
        self.quantizes_inputs = self.config.act_type == E4M3
        if self.quantizes_inputs:
            from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

            self.quant_fp8 = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        _hold(layer, weight if self.quantizes_inputs else weight.to(scale.dtype).float())
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and hasattr(layer, name):
                delattr(layer, name)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x [..., in] times the weight, [..., out]."""
        if not self.quantizes_inputs:
            return _multiply(layer, x.reshape(-1, x.shape[-1]).float(), x, bias)
        codes, scale = self.quant_fp8.forward_native(x.view(-1, x.shape[-1]))
        return _multiply(layer, codes.float() * scale, x, bias)


class DequantizingInt8LinearKernel(Int8ScaledMMLinearKernel):  # type: ignore[misc]
    """W8A8-int8: inputs are quantized by vLLM's own operator and multiplied in float32."""

    emulated = True

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Decline if the native kernel may be used; every CPU build has one."""
        return portable_wanted() or _is_disabled(
            CPUInt8ScaledMMLinearKernel
        ), "this build has a native kernel"

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Accept every variant of W8A8-int8."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the int8 weight with `weight` float32 [out, in]."""
        weight, scale, _, _, _ = self._get_layer_params(layer)
        if not self.config.is_channelwise:
            from vllm.model_executor.layers.quantization.utils.w8a8_utils import (
                convert_to_channelwise,
            )

            scale = convert_to_channelwise(scale, layer.logical_widths)
        _hold(layer, weight.float() * scale.float().view(-1, 1))

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return quantized x [..., in] times the weight, [..., out]."""
        from vllm._custom_ops import scaled_int8_quant

        _, _, scale, zero_point, _ = self._get_layer_params(layer)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        codes, scale, zero_point = scaled_int8_quant(
            rows,
            scale,
            None if zero_point is None else zero_point.to(torch.int32),
            symmetric=self.config.input_symmetric,
        )
        offset = torch.zeros(()) if zero_point is None else zero_point.float()
        return _multiply(layer, (codes.float() - offset) * scale, x, bias)


class DequantizingFp8LinearKernel(FP8ScaledMMLinearKernel):  # type: ignore[misc]
    """FP8 with scales per tensor, channel or token; vLLM's torch code quantizes inputs."""

    emulated = True

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Accept every CPU."""
        return True, None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Decline dynamic scales unless portable is requested; every CPU build supports them."""
        static = c.activation_quant_key.scale.static
        return portable_wanted() or (
            static_fp8_is_missing() and static
        ), "this build has a native kernel"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the FP8 weight [in, out] with `weight` float32 [out, in]."""
        weight, scale, _, _ = self._get_layer_params(layer)
        _hold(layer, weight.t().float() * scale.float().view(-1, 1))

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return quantized x [..., in] times the weight, [..., out]."""
        _, _, scale, limit = self._get_layer_params(layer)
        codes, scale = self.quant_fp8.forward_native(x.reshape(-1, x.shape[-1]), scale, limit)
        return _multiply(layer, codes.float() * scale, x, bias)

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        """Not reached: `apply_weights` does it all."""
        raise NotImplementedError


class DequantizingFp8BlockLinearKernel(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """FP8_BLOCK: vLLM's torch code quantizes inputs in groups."""

    emulated = True

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Decline if the native kernel runs here; it needs AMX."""
        native = torch.cpu._is_amx_tile_supported()
        return portable_wanted() or not native, "this machine has a native kernel"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the FP8 weight with `weight` float32 [out, in]."""
        super().process_weights_after_loading(layer)
        params = self._get_layer_params(layer)
        shape = self.weight_group_shape
        rows, columns = params.weight.shape
        # Some exporters call compressed-tensors' `weight_scale` `weight_scale_inv`.
        block_scale = params.weight_scale
        if params.weight_scale_inv is not None:
            block_scale = params.weight_scale_inv
        scale = block_scale.float().repeat_interleave(shape.row, dim=0)
        scale = scale.repeat_interleave(shape.col, dim=1)[:rows, :columns]
        _hold(layer, params.weight.float() * scale)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """Return quantized x [..., in] times the weight, [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = self.quant_fp8.forward_native(rows)
        spread = scale.repeat_interleave(self.quant_fp8.group_size, dim=1)[:, : rows.shape[1]]
        return _multiply(layer, codes.float() * spread, x, bias)

    def apply_block_scaled_mm(self, *_: Any, **__: Any) -> torch.Tensor:
        """Not reached: `apply_weights` does it all."""
        raise NotImplementedError


class _WeightOnlyFp4:
    """Shared by weight-only NVFP4 and MXFP4; no build has a CPU kernel for either."""

    emulated = True

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        codes = decode_e2m1(layer.get_parameter("weight").data)
        scale = self.group_scale(layer, layer.get_parameter("weight_scale").data)
        spread = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        # The default dtype while vLLM loads is the serving dtype, which a real kernel would use.
        _hold(layer, (codes * spread).to(torch.get_default_dtype()).float())

    def group_scale(self, layer: torch.nn.Module, scale: torch.Tensor) -> torch.Tensor:
        return decode_e8m0(scale)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return _multiply(layer, x.reshape(-1, x.shape[-1]).float(), x, bias)


class DequantizingMxFp4LinearKernel(_WeightOnlyFp4, MxFp4LinearKernel):  # type: ignore[misc]
    """MXFP4A16, dequantized once after loading."""


class DequantizingNvFp4LinearKernel(_WeightOnlyFp4, NvFp4LinearKernel):  # type: ignore[misc]
    """NVFP4A16, dequantized once after loading."""

    def group_scale(self, layer: torch.nn.Module, scale: torch.Tensor) -> torch.Tensor:
        """Return the scales float32 [out, groups]; vLLM has already inverted the global scale."""
        return scale.float() * layer.get_parameter("weight_global_scale").float()


class DequantizingNvFp4InputsLinearKernel(EmulationNvFp4LinearKernel):  # type: ignore[misc]
    """NVFP4: vLLM's torch code quantizes inputs; the weight is dequantized once after loading."""

    emulated = True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed weight with float32 `weight` [out, in], rounded as served."""
        super().process_weights_after_loading(layer)
        weight = dequantize_to_dtype(
            layer.get_parameter("weight").data.view(torch.uint8),
            layer.get_parameter("weight_scale").data,
            layer.weight_global_scale,
            torch.get_default_dtype(),
            NVFP4_GROUP,
            swizzle=False,
        )
        _hold(layer, weight.float())

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return quantized x [..., in] times the weight, [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        values = ref_nvfp4_quant_dequant(rows, layer.input_global_scale_inv, NVFP4_GROUP)
        return _multiply(layer, values.float(), x, bias)


class DequantizingMxfp8LinearKernel(EmulationMxfp8LinearKernel):  # type: ignore[misc]
    """MXFP8, dequantized once after loading by vLLM's own code; inputs are not quantized."""

    emulated = True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the MXFP8 weight with `weight` float32 [out, in]."""
        weight, scale = layer.get_parameter("weight").data, layer.get_parameter("weight_scale").data
        rows, columns = weight.shape
        blocks = scale[:rows, : columns // MXFP8_BLOCK_SIZE].contiguous()
        _hold(layer, dequant_mxfp8_to_bf16(weight.contiguous(), blocks).float())

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x [..., in] times the weight, [..., out]."""
        return _multiply(layer, x.reshape(-1, x.shape[-1]).float(), x, bias)


def weight_only_nvfp4() -> NvFp4LinearKernel:
    """Return a kernel for NVFP4A16."""
    return DequantizingNvFp4LinearKernel(NvFp4LinearLayerConfig())


# vLLM's tables of kernels, and the kernels to insert at the front of each on CPU.
KERNELS: dict[str, list[type]] = {
    "_POSSIBLE_KERNELS": [DequantizingLinearKernel],
    "_POSSIBLE_INT8_KERNELS": [DequantizingInt8LinearKernel],
    "_POSSIBLE_FP8_KERNELS": [DequantizingFp8LinearKernel],
    "_POSSIBLE_FP8_BLOCK_KERNELS": [DequantizingFp8BlockLinearKernel],
    "_POSSIBLE_NVFP4_KERNELS": [DequantizingNvFp4InputsLinearKernel],
    "_POSSIBLE_MXFP4_KERNELS": [DequantizingMxFp4LinearKernel],
    "_POSSIBLE_MXFP8_KERNELS": [DequantizingMxfp8LinearKernel],
}


def dequantize_groups(
    code: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Return (code - offset) * scale, float32 [out, in].

    `code` int [out, in]; `scale` and `offset` [out, groups], each group `in / groups` columns.
    """
    out, columns = code.shape
    groups = scale.shape[1]
    centred = code.view(out, groups, columns // groups) - offset.int().unsqueeze(2)
    return (centred.float() * scale.float().unsqueeze(2)).view(out, columns)


def _hold(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def _multiply(
    layer: torch.nn.Module, values: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return values float32 [rows, in] times the weight, rounded once to x's dtype and shape."""
    bias = None if bias is None else bias.float()
    product = torch.nn.functional.linear(values, layer.get_parameter("weight"), bias)
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _is_disabled(kernel: type) -> bool:
    """Whether the user disabled this vLLM kernel (`VLLM_DISABLED_KERNELS`)."""
    from vllm import envs

    return kernel.__name__ in envs.VLLM_DISABLED_KERNELS


def _has_native_wna16(config: Any) -> bool:
    """Whether vLLM's own kernel runs; AVX-512 builds have one for 4 bits, 16-bit activations."""
    return (
        hasattr(torch.ops._C, "cpu_gemm_wna16")
        and not _is_disabled(CPUWNA16LinearKernel)
        and config.act_type in (torch.bfloat16, torch.float16)
        and bool(CPUWNA16LinearKernel.can_implement(config)[0])
    )
