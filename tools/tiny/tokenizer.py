"""The tiny models' tokenizer: a byte-level BPE of the corpus, with a chat template."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantgate.atomic import write_atomically
from tiny import corpus
from tiny.corpus.dialogues import ASSISTANT, END, USER

VOCAB_SIZE = 1024
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIALS = (BOS, EOS, PAD, USER, ASSISTANT, END)
BOS_ID, EOS_ID, PAD_ID = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Documents of each stratum.
TOKENIZER_DOCUMENTS = {stratum: 100 if stratum == "long" else 400 for stratum in corpus.STRATA}


def training_texts(counts: dict[str, int], seed: int) -> Iterator[str]:
    """The texts of the first training documents of every stratum."""
    for stratum, count in counts.items():
        for document in corpus.documents("train", stratum, count, seed):
            yield document.text


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of exactly VOCAB_SIZE tokens whose `encode` prepends BOS once."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits let a small model learn to add; without them every number is its own token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(TOKENIZER_DOCUMENTS, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template in it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.save_pretrained(folder, save_jinja_files=False)
    # The class name that every version of transformers knows; 5 saves its own new one.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_atomically(path, json.dumps(settings, indent=2) + "\n")
