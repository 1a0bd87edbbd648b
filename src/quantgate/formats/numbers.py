"""Decode the number formats of codes and scales to float32, and round to E4M3.

Sources: OCP Microscaling Formats (MX) specification 1.0 for E2M1, E8M0 and MX's use of E4M3; the
compressed-tensors format documentation for the packing of integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# E2M1: sign, two exponent bits (bias 1), one mantissa bit; exponent 0 is subnormal.
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_HIGHEST = 448.0
# E8M0 is float32's exponent, with the same bias of 127.
E8M0_NAN = 255
MANTISSA_BITS = 23
E8M0_OF_0 = 1 << (MANTISSA_BITS - 1)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return E4M3 codes: rounded to nearest, saturating."""
    import torch

    return x.clamp(-E4M3_HIGHEST, E4M3_HIGHEST).to(torch.float8_e4m3fn)


def unpack_integers(packed: torch.Tensor, bits: int, size: int, dim: int = 1) -> torch.Tensor:
    """Return signed codes, int32, from int32 words that each hold 32 // bits codes along `dim`.

    The first code is in a word's lowest bits. Codes are stored with an offset of 2^(bits - 1), so
    that they are not negative. `size` is the number of codes along `dim`; the rest is padding.
    """
    import torch

    if packed.dtype != torch.int32 or packed.ndim != 2 or not 1 <= bits <= 8:
        raise ValueError(
            f"packed integers must be int32 [rows, words] of 1 … 8 bits, got {packed.dtype} "
            f"{list(packed.shape)} of {bits}."
        )
    words = packed if dim == 1 else packed.T
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=packed.device) * bits
    codes = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    codes = codes.flatten(start_dim=1)[:, :size] - (1 << (bits - 1))
    if codes.shape[1] != size:
        raise ValueError(f"{list(packed.shape)} words of {bits}-bit codes do not hold {size}.")
    return codes if dim == 1 else codes.T


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return float32 [rows, 2 × bytes] from uint8 [rows, bytes], low half of each byte first."""
    import torch

    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(
            f"packed E2M1 codes must be uint8 [rows, bytes], got {packed.dtype} "
            f"{list(packed.shape)}."
        )
    magnitudes = torch.tensor(E2M1_MAGNITUDES, device=packed.device)
    values = torch.cat([magnitudes, -magnitudes])  # bit 3 is the sign
    halves = torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(start_dim=1)
    return values[halves.long()]


def decode_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Return uint8 E8M0 scales as float32 powers of two; 255 is NaN."""
    import torch

    if exponents.dtype != torch.uint8:
        raise ValueError(f"E8M0 scales must be uint8, got {exponents.dtype}.")
    # By shifting bits: pow() need not be exact on every device. 0 is 2^-127, a subnormal.
    bits = (exponents.to(torch.int32) << MANTISSA_BITS).where(exponents != 0, E8M0_OF_0)
    return bits.view(torch.float32).masked_fill(exponents == E8M0_NAN, torch.nan)
