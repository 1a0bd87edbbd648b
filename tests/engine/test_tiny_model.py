"""The shipped tiny checkpoint is the trained model its record describes, and its probe is sound."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tiny import corpus

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "fixtures/tiny/llama"
PROBES = {
    name: ROOT / f"fixtures/probes/{name}.jsonl" for name in ("tiny", "tiny-quality", "tiny-short")
}

Window = dict[str, Any]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Path:
    return ROOT / "fixtures/tiny" / str(request.param)


@pytest.fixture(scope="module")
def record(model: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((model / "training.json").read_text())
    return loaded


@pytest.fixture(scope="module", params=PROBES)
def probe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def windows(probe: str) -> list[Window]:
    lines = PROBES[probe].read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_the_probes_are_what_the_script_makes(probe: str) -> None:
    """And so are the beginnings of one the beginnings of the other."""
    from tokenizers import Tokenizer

    from tiny import probes

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    made = probes.make_probes(tokenizer, seed=0)[probe]
    assert PROBES[probe].read_text(encoding="utf-8") == "".join(probes.probe_lines(probe, made))


def test_the_corpus_depends_on_the_seed_alone() -> None:
    for stratum in corpus.STRATA:
        first = list(corpus.documents("train", stratum, 20, seed=3))
        assert first == list(corpus.documents("train", stratum, 20, seed=3))
        assert first != list(corpus.documents("train", stratum, 20, seed=4))
        assert first[7] == corpus.document("train", stratum, 7, seed=3)


def test_an_unknown_stratum_is_an_error() -> None:
    with pytest.raises(ValueError, match="poetry"):
        corpus.document("train", "poetry", 0)


def test_entity_spans_match_the_text() -> None:
    labels = set()
    for stratum in corpus.STRATA:
        for document in corpus.documents("heldout", stratum, 100):
            end = 0
            for entity in document.entities:
                assert end <= entity.start < entity.end <= len(document.text)
                surface, end = document.text[entity.start : entity.end], entity.end
                assert surface == surface.strip()
                assert surface[0].isupper() or entity.label == "DATE"
                assert any(map(str.isdigit, surface)) == (entity.label in ("DATE", "PRODUCT"))
                labels.add(entity.label)
    assert labels == set(corpus.LABELS)


def test_long_documents_return_to_what_they_began_with() -> None:
    for document in corpus.documents("heldout", "long", 20):
        names = [document.text[entity.start : entity.end] for entity in document.entities]
        answer = document.text.rsplit("Answer: ", 1)[1].strip(".\n")
        assert answer in names[:10]


def test_no_probe_document_is_in_the_training_set(
    record: dict[str, Any], windows: list[Window]
) -> None:
    trained = {
        document.text
        for stratum, count in record["training_documents"].items()
        for document in corpus.documents("train", stratum, count, record["seed"])
    }
    assert not trained & {window["text"] for window in windows}


def test_the_probe_holds_the_corpus_s_heldout_documents(
    record: dict[str, Any], windows: list[Window]
) -> None:
    for window in windows:
        split, stratum, index = window["document"].split("-")
        assert stratum == window["stratum"]
        assert split == "heldout"
        made = corpus.document(split, stratum, int(index), record["seed"])
        assert made.text.startswith(window["text"])


def test_the_probes_are_large_enough_and_cover_every_stratum(
    probe: str, windows: list[Window]
) -> None:
    """30 documents are the fewest that the statistics rely on; quality needs power besides."""
    documents, tokens, shortest, shortest_long = {
        "tiny": (30, 3500, 90, 500),
        "tiny-quality": (40, 8000, 100, 800),
        "tiny-short": (40, 500, 13, 13),
    }[probe]
    assert len({window["document"] for window in windows}) == len(windows) >= documents
    assert sum(len(window["ids"]) - window["score_from"] for window in windows) >= tokens
    for stratum in corpus.STRATA:
        lengths = [len(window["ids"]) for window in windows if window["stratum"] == stratum]
        assert len(lengths) >= (2 if stratum == "long" else 6)
        assert min(lengths) >= (shortest_long if stratum == "long" else shortest)
        assert max(lengths) <= (1000 if stratum == "long" else 400)


def test_probe_texts_tokenize_to_their_ids(windows: list[Window]) -> None:
    from transformers import AutoTokenizer

    header = json.loads(PROBES["tiny"].read_text(encoding="utf-8").splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == header["vocab_size"] == 1024
    for window in windows:
        ids = window["ids"]
        assert tokenizer(window["text"])["input_ids"] == ids
        assert [place for place, token in enumerate(ids) if token == header["bos_token_id"]] == [0]
        assert max(ids) < header["vocab_size"]
        assert window["score_from"] == 1


def test_the_chat_template_renders_what_the_corpus_writes() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = PROBES["tiny-quality"].read_text(encoding="utf-8").splitlines()
    windows = [json.loads(line) for line in lines[1:]]
    for window in windows:
        if window["stratum"] != "chat":
            continue
        messages = []
        for turn in window["text"].split("<|end|>\n")[:-1]:
            role, content = turn.split("|>\n", 1)
            messages.append({"role": role.removeprefix("<|"), "content": content})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == "<|bos|>" + window["text"]
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == window["ids"]


def test_the_record_is_of_the_shipped_file(model: Path, record: dict[str, Any]) -> None:
    weights = model / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"]
    assert weights.stat().st_size <= 6_000_000


def test_the_weights_have_the_recorded_perplexity(model: Path, record: dict[str, Any]) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from tiny import probes

    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    # Small matrices: a second thread costs more than it brings when the machine is busy.
    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {}
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for window in probes.heldout_windows(tokenizer, probes.HELDOUT_DOCUMENTS, seed=0):
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            predicted = scorer(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.setdefault(window.stratum, []).extend(
            (-predicted.gather(1, ids[0, 1:, None])).flatten().tolist()
        )
    torch.set_num_threads(threads)
    every = [loss for stratum in losses.values() for loss in stratum]
    perplexity = math.exp(math.fsum(every) / len(every))
    assert perplexity == pytest.approx(record["heldout_perplexity"], rel=1e-3)
    assert perplexity <= record["unigram_perplexity"] / 5
    for stratum, stated in record["strata"].items():
        mean = math.fsum(losses[stratum]) / len(losses[stratum])
        assert math.exp(mean) == pytest.approx(stated["perplexity"], rel=1e-3)
        assert math.exp(mean) <= stated["unigram_perplexity"] / 5
