"""The scripts that label and reward tokens: what they print, and what they say of bad input."""

import re
from pathlib import Path

import pytest

from quantgate.commands.token_table import label_texts, show
from quantgate.errors import BadInput

NER = "build/tiny-ner-bert-w4a16"


def test_a_table_has_a_row_for_each_token(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32 the probabilities are those of a softmax over the logits."""
    import numpy as np

    texts = ["On 2 July 1928 Taswell told Minding.", "\x1b[31m[bold]x"]
    found = label_texts(str(root / NER), "token_classification", 6, texts, "float32")
    for token in found.texts[0]:
        exponentials = np.exp(np.array(token.logits) - max(token.logits))
        assert token.probability == pytest.approx(max(exponentials) / sum(exponentials), rel=1e-5)
        assert token.label == found.labels[int(np.argmax(token.logits))]
    assert {"DATE", "PERSON"} <= {token.label for token in found.texts[0]}
    show(found)
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "emulated kernels: DequantizingLinearKernel" in printed
    rows = re.findall(r" [01]\.\d{4}$", printed, re.MULTILINE)
    assert len(rows) == sum(map(len, found.texts))


@pytest.mark.parametrize(
    ("model", "labels", "text", "message"),
    [
        (NER, 3, "x", r"num_labels is 3, but the checkpoint has 6 labels"),
        (NER, 6, "", r"--text number 1 is empty"),
        (
            NER,
            6,
            "word " * 2000,
            r"--text number 1 has \d+ tokens, but the model takes at most 1024",
        ),
        ("fixtures/tiny/llama", None, "x", r"a LlamaForCausalLM has no head for labels"),
        ("no-such-model", None, "x", r"its config.json cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    root: Path, model: str, labels: int | None, text: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        label_texts(str(root / model), "token_classification", labels, [text], "float32")
    assert "\n" not in str(caught.value)
