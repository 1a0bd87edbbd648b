"""The least time that a forward pass and exact scores take on this machine."""

import argparse

from gpu.timing import peak_memory

# The side of the matrices whose product is this machine's rate.
RATE_SIZE = {"cuda": 8192, "cpu": 512}


def floors(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that "prefill" and everything else cannot do without.

    Two operations for each weight and token, and for each pair of tokens that attend, twice the
    width of the heads; at the rate of one large product in the dtype of the linears' inputs.
    """
    head_width = arguments.hidden // arguments.heads
    queries, keys = arguments.heads * head_width, arguments.kv_heads * head_width
    weights = arguments.hidden * (2 * queries + 2 * keys + 3 * arguments.intermediate)
    tokens = arguments.prompts * arguments.tokens
    linears = 2.0 * weights * arguments.layers * tokens
    attention = 2.0 * queries * arguments.tokens * tokens * arguments.layers
    head = 2.0 * arguments.hidden * arguments.vocab * tokens
    rate = matrix_rate(arguments.dtype)
    inside = matrix_rate("float8_e4m3fn") if arguments.scheme.startswith("FP8") else rate
    prefill = linears / inside + attention / rate
    return {"prefill": prefill, "score": prefill + head / rate}


def matrix_rate(dtype: str) -> float:
    """Return the operations a second of the best of ten large products on random numbers."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = RATE_SIZE[device]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == "float8_e4m3fn" and device == "cuda":
        one = torch.ones((), device=device)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

        def product() -> object:
            return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
    else:
        a, b = (x.to(getattr(torch, "bfloat16" if "float8" in dtype else dtype)) for x in (a, b))

        def product() -> object:
            return a @ b

    seconds = []
    for _ in range(13):
        seconds.append(peak_memory(product)[0])
    return float(2 * size**3 / min(seconds[3:]))
