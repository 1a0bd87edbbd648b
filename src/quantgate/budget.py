"""Budgets: what a check allows by default, and where each number comes from."""

from __future__ import annotations

from quantgate.checkpoint import BadInput, Checkpoint

# The largest |Δ log-probability| between vLLM in float32 and HF in float32 over the same weights.
# float32 sums of a few thousand terms carry relative errors of 1e-7 to 1e-6 (Higham, "Accuracy and
# Stability of Numerical Algorithms", 2002, chapter 4), and logits lie below 30. A model that
# amplifies rounding more than that is allowed what float32 costs its reference, measured against
# float64, times ROUNDING_FACTOR.
FP32_MAX = 1e-5

# What the reference's own error in a dtype is multiplied by. The engine and the reference
# round the same computation independently, so their errors have the same size, and by the triangle
# inequality an engine that only rounds is within twice it.
ROUNDING_FACTOR = 2.0

# A drift of the mean NLL that matters: 0.1 % of perplexity, a tenth of what vLLM's own perplexity
# tests allow between vLLM and HF (tests/models/language/generation_ppl_test, 1 %).
DRIFT_MEAN = 1e-3

# Mean ΔNLL against the unquantized base, in nat per token, that a scheme may cost: published
# ln(PPL(Q)/PPL(base)) of a plain round-to-nearest quantization of the same width.
QUALITY_MARGIN = {
    # llama.cpp's scoreboard for Llama 3 8B on WikiText-2 (tools/perplexity/README.md): f16
    # 6.233160, q4_0 (4 bits, round to nearest, groups of 32) 6.700147; ln of the ratio is 0.0722.
    "W4A16": 0.0722,
}


def quality_margin(checkpoint: Checkpoint, scheme: str) -> float:
    """Return the margin for `quality`, the checkpoint's own where its file gives one."""
    if override := checkpoint.budget.get("quality"):
        return override.margin
    if scheme not in QUALITY_MARGIN:
        raise BadInput(
            f"{checkpoint.id}: no default quality budget for scheme '{scheme}'; give one as "
            "[budget.quality] with margin (nat per token) and reason in its file."
        )
    return QUALITY_MARGIN[scheme]


def drift_margin(checkpoint: Checkpoint) -> float:
    """Return the margin for the mean in `drift`, the checkpoint's own where its file gives one."""
    override = checkpoint.budget.get("drift")
    return override.margin if override else DRIFT_MEAN
