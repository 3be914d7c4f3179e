"""A tiny model that reads bytes, and texts for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.core.tiny import save_base
from trimkv_core.training.settings import TrainSettings

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ["<pad>", "<bos>", "<im_start>", "<im_end>"]
VOCABULARY = len(BYTES) + len(SPECIALS)
TEMPLATE = (
    "{% for message in messages %}<im_start>{{ message['role'] }}\n{{ message['content'] }}<im_end>\n{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)
# As some models do: what the assistant said goes once a later turn follows.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "<im_start>{{ message['role'] }}\n{{ message['content'] }}<im_end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
)
WORDS = ("entry", "page", "gate", "budget", "token", "stream", "a", "the", "of", "forgets", "keeps", "reads")


def make_tokenizer(*, has_bos: bool = False, template: str | None = TEMPLATE) -> Any:
    """A token for each byte, with or without a beginning-of-sequence token before texts."""
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *BYTES])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    if has_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>")
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path) -> Path:
    """A tiny base model with its tokenizer."""
    save_base(folder, "llama", vocab_size=VOCABULARY)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_text(characters: int, seed: int = 0) -> str:
    """Words in lines, of `characters` bytes."""
    chance = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += chance.choice(WORDS) + chance.choice((" ", " ", " ", "\n"))
    return text[:characters]


def chat(question: str, answer: str) -> dict[str, Any]:
    """One conversation, as a line of a chat file has it."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, *items: object) -> Path:
    """A `.jsonl` file."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def tiny_settings(model: Path, data: Path, output: Path, **changes: Any) -> TrainSettings:
    """Settings of a run of a few short steps."""
    values: dict[str, Any] = {
        "model": str(model),
        "data": (str(data),),
        "output": output,
        "memory_size": 8,
        "seq_len": 48,
        "steps": 6,
        "learning_rate": 1e-2,
        "logit_block": 16,
        "save_every": 2,
        "num_threads": 1,
    }
    if "gates" not in changes:
        values |= {"retention_gate_intermediate_size": 8, "bias_init": 3.0}
    return TrainSettings(**(values | changes))
