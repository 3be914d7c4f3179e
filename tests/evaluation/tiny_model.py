"""A tiny model with gates, loaded for judging, and a tokenizer of bytes for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.core.tiny import save_base, save_random_gates
from trimkv_core.evaluation.loading import LoadedModel, load_model
from trimkv_core.evaluation.tasks import Probe, Span

VOCABULARY = 300
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_model(folder: Path, family: str = "llama", *, with_tokenizer: bool = False) -> None:
    """`folder/base` and `folder/gates`."""
    save_base(folder / "base", family, vocab_size=VOCABULARY)
    save_random_gates(folder / "gates", folder / "base", num_sink_tokens=2)
    if with_tokenizer:
        byte_tokenizer().save_pretrained(folder / "base")


def load(folder: Path, family: str = "llama", *, with_tokenizer: bool = False) -> LoadedModel:
    save_model(folder, family, with_tokenizer=with_tokenizer)
    return load_model(str(folder / "base"), str(folder / "gates"), device=torch.device("cpu"))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and the chat template writes turns as they are."""
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT)


def probe(tokens: int, *, seed: int = 0) -> Probe:
    """Random tokens, all but the first predicted."""
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Probe(tuple(ids.tolist()), (Span(1, tokens),))
