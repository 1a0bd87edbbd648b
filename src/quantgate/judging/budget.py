"""Budgets: the default limits of checks, and where each number comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantgate.errors import BadInput
from quantgate.subject.files import parameters_of
from quantgate.subject.task import GENERATE, Task

if TYPE_CHECKING:
    from quantgate.subject.checkpoint import Checkpoint

# The largest |Δ log-probability| between vLLM in float32 and HF in float32 over the same weights.
# float32 sums of a few thousand terms carry relative errors of 1e-7 to 1e-6 (Higham, "Accuracy and
# Stability of Numerical Algorithms", 2002, chapter 4), and logits lie below 30. A model that
# amplifies rounding more than that is allowed ROUNDING_FACTOR times the error that float32 causes
# in its reference, measured against float64, and the engine's error is then measured against
# float64 too.
FP32_MAX = 1e-5

# The same for raw logits, rewards and embeddings, which no log-softmax keeps small: values of up to
# 20 with relative errors of 1e-6.
FP32_MAX_RAW = 2e-5

# Factor on the reference's own error in a dtype. The reference rounds like the vLLM build in use
# (`builds`), but in different places: one fuses what the other does in two steps. The squares of
# independent rounding errors add up, so twice the error allows for four times as many roundings.
# The reference's error is the mean of a sample; `stats.rounding_allowance` adds the amount by which
# another sample of the same size exceeds it once in a thousand.
ROUNDING_FACTOR = 2.0

# A drift of the mean NLL that matters: 0.1 % of perplexity, a tenth of what vLLM's own perplexity
# tests allow between vLLM and HF (tests/models/language/generation_ppl_test, 1 %).
DRIFT_MEAN = 1e-3

# Replay in float32: the rms error of one linear's output on the engine's own input, relative to the
# rms of that output, and the same for that input. A float32 sum of K terms in any order has an
# error of about sqrt(K) x 2^-24 of the terms' root sum of squares (Higham 2002, rule of thumb in
# section 4.2): 1e-5 for K = 28,000, more inputs than any layer of today's models has.
REPLAY_MODULE = 1e-5

# Replay in float32: mean |Δ log-probability| on the engine's own inputs. Only the steps between the
# last linear and the log-softmax contribute: two roundings of a logit below 30, at 2^-24 each, are
# 3.6e-6 at most and a quarter of that on average (errors uniform, of random sign). What comes
# before them, the additions of the residual stream, is relative to its largest values, and the head
# to the terms of its sums: a model with massive activations or large logits is allowed
# ROUNDING_FACTOR times what float32 causes in the replayed reference, measured against float64.
REPLAY_MEAN = 1e-6

# Replay in float32: the share of a layer's tokens for which the engine chose other experts than the
# reference did on the same inputs. Both may round two experts' scores differently if these are
# within REPLAY_MODULE of each other; of 512 experts, about 512 x 1e-5 = 0.5 % of the tokens have
# their last chosen expert that near to the next.
OTHER_EXPERTS = 1e-2

# Replay in a 16-bit dtype, as a module's relative rms error: its weights and its output are each
# rounded once, to half a unit in the last place of bfloat16 (2^-9) or float16 (2^-12).
REPLAY_MODULE_16_BIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
# FP8 tensor cores of compute capability 8.9 and 9.0 align products to the largest of them and of
# the sum so far, and drop what is less than 2^-13 of it (`kernels.truncates_sums`).
FP8_SUM = 2.0**-13


def fp8_sum_error(depth: int) -> float:
    """Return the rms error, relative to its rms, of a sum of `depth` products in FP8 tensor cores.

    Each product loses up to u = 2^-13 x the sum so far, whose rms is sqrt(k) after k of them; of
    random sign, that is a variance of u^2 / 3 each, and 2^-26 depth^2 / 6 in all, of a sum whose
    variance is depth. At depth 512 that is 1.1e-3, where an H200 measured 5.4e-4 and a model
    (`tools/simulate_tensor_cores.py`) gives 3.3e-4; at 14,336 it is 6.0e-3, and 3.0e-3.
    """
    return float(FP8_SUM * (depth / 6) ** 0.5)


@dataclass(frozen=True)
class SchemeBudget:
    """The allowed cost of schemes: mean ΔNLL against the unquantized base, nat per token."""

    schemes: tuple[str, ...]
    """By the prefixes of their names."""
    margin: float
    source: str
    parameters: tuple[float, float] | None = None
    """The sizes of model that it is for; None for any that no other budget of the scheme is for."""

    def fits(self, part: str, parameters: int | None) -> bool:
        """Whether it is the budget of a scheme's part, in a model of so many parameters."""
        if not part.startswith(self.schemes):
            return False
        if self.parameters is None or parameters is None:
            return self.parameters is None
        least, most = self.parameters
        return least <= parameters < most


# Published ln(PPL(Q)/PPL(base)) of the simplest quantization of the same width: one that costs more
# was not done well. Four bits cost a small model more, by any method: there, the published cost of
# GPTQ in a model of at most about twice or half its size, which rounding to nearest may exceed.
_GPTQ = "GPTQ (arXiv:2210.17323), table of OPT models on WikiText-2"
SCHEME_BUDGETS = (
    SchemeBudget(
        ("W4", "NVFP4", "MXFP4"),
        0.118,
        f"{_GPTQ}: OPT-125M 27.65, with GPTQ in 4 bits 31.12; ln of the ratio",
        (60e6, 220e6),
    ),
    SchemeBudget(
        ("W4", "NVFP4", "MXFP4"),
        0.097,
        f"{_GPTQ}: OPT-350M 22.00, with GPTQ in 4 bits 24.24; ln of the ratio",
        (220e6, 700e6),
    ),
    SchemeBudget(
        ("W4", "NVFP4", "MXFP4"),
        0.0722,
        "llama.cpp tools/perplexity/README.md, Llama 3 8B on WikiText-2: f16 6.233160, q4_0 (4 "
        "bits, round to nearest, groups of 32) 6.700147; ln of the ratio",
    ),
    SchemeBudget(
        ("W8", "FP8", "MXFP8", "KV_FP8"),
        0.0186,
        "vLLM tests/models/language/generation_ppl_test on WikiText-2: Qwen3-0.6B 23.864, "
        "Qwen3-0.6B-FP8 24.313; ln of the ratio",
    ),
)


# `SCHEME_BUDGETS` also limits a scheme's mean KL divergence from the base, in nat: on text sampled
# from the base the two are equal, since the expectation of ΔNLL under the base is KL(base ||
# other). llama.cpp's q4_0 of Llama 3 8B has 0.0722 and a mean KLD of 0.0719.

# How much of a task's own metric (entity F1, step accuracy, ranking accuracy, retrieval)
# quantization may cost, as a fraction of the base's: MLPerf Inference requires a quantized model to
# reach 99 % of the float32 reference (inference rules, "Model Quality").
METRIC_LOSS = 0.01

# How far float32 probabilities or unit vectors may be from float64 ones of the same raw outputs:
# exponentials, a sum and a quotient, each to a unit in the last place of a number up to 1 (2^-23).
ACTIVATION_MAX = 8 * 2.0**-23


# How far a float32 value may depend on how it is served: sums of the same terms in a different
# order, as for FP32_MAX.
INVARIANCE_MAX = FP32_MAX


@dataclass(frozen=True)
class Limit:
    """A limit shared by all schemes."""

    check: str
    what: str
    allowed: str
    source: str


_OWN = "what rounding as this build does costs the reference, measured in the run"
LIMITS = (
    Limit(
        "fidelity-float32, drift-float32",
        "max |Δ log-prob|",
        f"{FP32_MAX:g} nat",
        f"float32 sums (Higham 2002, chapter 4); beyond it {ROUNDING_FACTOR:g} x float32's error",
    ),
    Limit(
        "the same of models that pool",
        "max |Δ| of raw outputs",
        f"{FP32_MAX_RAW:g}",
        "values up to 20, relative errors of 1e-6",
    ),
    Limit(
        "fidelity, drift where inputs are quantized or in 16 bits",
        "mean |Δ|",
        f"{ROUNDING_FACTOR:g} x rounding, and its error",
        f"{_OWN}: four times as many roundings; 1 in 1,000 of as few values is beyond",
    ),
    Limit(
        "divergence-from-reference",
        "mean KLD",
        f"{ROUNDING_FACTOR**2:g} x rounding, and its error",
        f"{_OWN}; divergence goes with the square of an error",
    ),
    Limit(
        "drift-serving, drift-float32 where inputs are quantized",
        "mean ΔNLL, both sides",
        f"{DRIFT_MEAN:g} nat/token",
        "a tenth of vLLM's own 1 % (tests/models/language/generation_ppl_test)",
    ),
    Limit(
        "the same on another arithmetic than the golden's",
        "mean ΔNLL, both sides",
        f"{DRIFT_MEAN:g} + rounding's shift, here and there",
        "upper 95 % bounds of the mean that rounding moves the reference by, on each of the two",
    ),
    Limit(
        "replay-float32",
        "error of a linear, of its rms",
        f"{REPLAY_MODULE:g}",
        "sqrt(K) x 2^-24 for K = 28,000 (Higham 2002, section 4.2)",
    ),
    Limit(
        "replay-float32",
        "mean |Δ log-prob|",
        f"{REPLAY_MEAN:g} nat",
        "two roundings of a logit below 30; beyond it "
        f"{ROUNDING_FACTOR:g} x float32's error in the replayed reference",
    ),
    Limit(
        "replay-float32",
        "tokens with other experts, weights' error",
        f"{OTHER_EXPERTS:.0%}, {REPLAY_MODULE:g}",
        "of 512 experts 0.5 % are within rounding of the next; as a linear",
    ),
    Limit(
        "replay-serving",
        "error of a linear, of its rms",
        ", ".join(f"{limit:.2g} ({name})" for name, limit in REPLAY_MODULE_16_BIT.items()),
        "half a unit in the last place, twice; in FP8 tensor cores of sm89 and sm90, with "
        "2^-13 x sqrt(K / 6) in quadrature",
    ),
    Limit(
        "invariance, tensor-parallel, compiled",
        "max |Δ| in float32",
        f"{INVARIANCE_MAX:g}",
        "as fidelity-float32; elsewhere the mean, as fidelity",
    ),
    Limit(
        "quality of models that pool",
        "loss of the task's metric",
        f"{METRIC_LOSS:.0%} of the base's",
        "MLPerf Inference rules, Model Quality: 99 %",
    ),
)


def fp32_max(task: Task) -> float:
    """Return the largest |Δ| between engine and reference in float32."""
    return FP32_MAX if task == GENERATE else FP32_MAX_RAW


def quality_margin(checkpoint: Checkpoint, scheme: str) -> float:
    """Return the margin for `quality`: the checkpoint's own if its file gives one."""
    if override := checkpoint.budget.get("quality"):
        return override.margin
    base = checkpoint.base_checkpoint
    size = None if base is None else parameters_of(base.directory)
    margins = [_margin_of(part, size) for part in scheme.split("+")]
    if None in margins:
        raise BadInput(
            f"{checkpoint.id}: no default quality budget for scheme '{scheme}'; give one as "
            "[budget.quality] with margin (nat per token) and reason in its file."
        )
    # With several groups, the largest allowed cost.
    return max(margin for margin in margins if margin is not None)


def _margin_of(part: str, parameters: int | None) -> float | None:
    return next((b.margin for b in SCHEME_BUDGETS if b.fits(part, parameters)), None)


def drift_margin(checkpoint: Checkpoint) -> float:
    """Return the margin for the mean in `drift`: the checkpoint's own if its file gives one."""
    override = checkpoint.budget.get("drift")
    return override.margin if override else DRIFT_MEAN
