"""`POST /tokenize`: the very tokens a chat request would compute, and text that adds up to the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.generation.chat_format import ChatMessage
from tests.service import scripted
from tests.service.scripted import INFO, ScriptedEngine, serving

MESSAGES = [{"role": "user", "content": "a 🦊 ran"}]


class ByteChatFormat(scripted.CountingChatFormat):
    """One token a byte, by a real tokenizer: characters of several bytes are split."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: number for number, character in enumerate(alphabet)}
        self.backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        text = "".join(f"<{message.role}>{message.content}" for message in messages)
        return list(self.backend.encode(f"{text}<assistant>").ids)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(scripted, "CountingChatFormat", ByteChatFormat)
    with serving(ScriptedEngine()) as address, httpx.Client(base_url=address) as client:
        yield client


def tokenize(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/tokenize", json={"model": "tiny/model"} | fields)


def test_a_conversation_is_cut_as_a_chat_request_would_be(client: httpx.Client) -> None:
    body = tokenize(client, messages=MESSAGES).json()
    assert body["tokens"] == ByteChatFormat().encode_chat([ChatMessage(role="user", content="a 🦊 ran")])  # type: ignore[arg-type]
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == INFO.max_model_len
    assert body["token_strs"] is None


def test_texts_of_tokens_add_up_and_hold_no_half_characters(client: httpx.Client) -> None:
    body = tokenize(client, messages=MESSAGES, return_token_strs=True).json()
    assert "".join(body["token_strs"]) == "<user>a 🦊 ran<assistant>"
    assert len(body["token_strs"]) == body["count"]
    fox = body["token_strs"].index("🦊")
    assert body["token_strs"][fox - 3 : fox] == ["", "", ""]


def test_a_prompt_is_cut_as_it_is(client: httpx.Client) -> None:
    body = tokenize(client, prompt="a b", return_token_strs=True).json()
    assert body["token_strs"] == ["a", " ", "b"]
    assert tokenize(client, prompt="").json()["count"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"messages": MESSAGES, "prompt": "a"}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "a" * (INFO.max_model_len + 1), "return_token_strs": True}, 400, "return_token_strs"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_cut_is_said(client: httpx.Client, fields: dict[str, Any], status: int, param: str) -> None:
    answer = tokenize(client, **fields)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
