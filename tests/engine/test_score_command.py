"""`quantgate score`: each token's log-probability and rank, as HF has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.__main__ import main

PROBE = Path(__file__).resolve().parents[2] / "fixtures" / "probes" / "tiny.jsonl"
TEXT = json.loads(PROBE.read_text(encoding="utf-8").splitlines()[1])["text"]
CASES = [
    {"prompt": "The committee met", "continuation": " in the town hall."},
    {"text": TEXT[:200]},
]


@pytest.fixture(scope="module")
def records(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("score")
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    arguments = ["score", str(root / "fixtures/tiny/llama"), "--jsonl", str(lines)]
    more = ["--dtype", "float32", "--enforce-eager", "--out", str(folder / "out.jsonl")]
    assert main([*arguments, *more]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_token_is_scored_as_by_hf(
    root: Path, records: list[dict[str, Any]], number: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = root / "fixtures/tiny/llama"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    case = CASES[number]
    ids = tokenizer("".join(case.values()))["input_ids"]
    start = len(tokenizer(case["prompt"])["input_ids"]) if "prompt" in case else 1
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    own = [record for record in records if record["document"] == str(number)]
    assert [record["position"] for record in own] == list(range(start, len(ids)))
    assert [record["id"] for record in own] == ids[start:]
    assert [record["token"] for record in own] == [tokenizer.decode([one]) for one in ids[start:]]
    for record in own:
        row = logprobs[record["position"] - 1]
        expected = row[record["id"]]
        assert record["logprob"] == pytest.approx(expected, abs=1e-5)
        # Two tokens whose logits differ by rounding may change places.
        ranks = [1 + int(np.sum(row > expected + shift)) for shift in (1e-5, -1e-5)]
        assert ranks[0] <= record["rank"] <= ranks[1]
    assert len({record["rank"] == 1 for record in records}) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "lines.jsonl:1: neither"),
        ("[1]", "lines.jsonl:1: neither"),
        ('{"text": 3}', "a value is no string"),
        ('{"text": ""}', "lines.jsonl:1: nothing to score"),
        ("", "no lines in it"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "lines.jsonl").write_text(line)
    model = str(root / "fixtures/tiny/llama")
    assert main(["score", model, "--jsonl", str(tmp_path / "lines.jsonl")]) == 4
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: ")
    assert message in said
