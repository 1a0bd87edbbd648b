"""The memory of `quantgate kld` does not grow with the text, but for some bytes a token."""

import json
import shutil
from pathlib import Path

import pytest
from harness import SMALL, make_model
from preloaded import run_python

MIB = 1 << 20
# Chunks of 512 tokens, and tokenizing in small pieces. A text whose states, windows or outputs were
# kept would show.
SCRIPT = """
import argparse, json, pathlib, sys
from quantgate.commands import kld, texts
from quantgate.measuring import states

states.MOST_TOKENS = 512
texts.PIECE = 1 << 14
parser = argparse.ArgumentParser()
parser.add_argument("model")
kld.add_arguments(parser)
parser.set_defaults(project=pathlib.Path.cwd())
for text in sys.argv[2:]:
    given = ["--base", sys.argv[1], "--text-file", text, "--protocol", "exl3", "--rows", "0",
             "--context-length", "256", "--enforce-eager"]
    report, _ = kld.measure(parser.parse_args([sys.argv[1], *given]))
    print(json.dumps({"scored": report["scored"], "peak": report["peak_memory_mib"]}))
"""


@pytest.mark.slow(reason="scores a text ten times as long as the probe")
def test_ten_times_the_text_takes_the_same_memory(root: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model(model, "LlamaConfig", **{**SMALL, "vocab_size": 1024})
    for path in (root / "fixtures/tiny/llama").glob("*token*"):
        shutil.copy(path, model / path.name)
    lines = (root / "fixtures" / "probes" / "tiny.jsonl").read_text().splitlines()[1:]
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    texts = []
    for times in (1, 10):
        texts.append(tmp_path / f"{times}.txt")
        texts[-1].write_text(text * times)
    # The short one twice: engines leave something behind whatever they have scored.
    result = run_python("-c", SCRIPT, model, texts[0], *texts, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    _, short, long = map(json.loads, result.stdout.splitlines())
    assert long["scored"] > 9 * short["scored"] > 9 * 3000
    more = (
        (long["scored"] - short["scored"]) * 100 / MIB
    )  # 49 bytes a token, and as many in passing
    assert long["peak"] - short["peak"] < more + 8
