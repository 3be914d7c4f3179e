"""What a prompt promises: it is the template's, whatever OpenAI's messages look like, or an error that says why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.generation.chat_format import ChatFormat, ChatFormatError, ChatMessage, Role, TokenizerError

TEMPLATE = "".join(
    [
        "{% for message in messages %}",
        "{{ '<|im_start|>' + message.role }}{% if message.name %}{{ ' ' + message.name }}{% endif %}",
        "{{ '\n' + message.content }}",
        "{% for call in message.tool_calls or [] %}",
        "{{ '\n' + call.id + ' ' + call.function.name + '(' }}",
        "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %})",
        "{% endfor %}",
        "{% if message.tool_call_id %}{{ ' for ' + message.tool_call_id }}{% endif %}",
        "{{ '<|im_end|>\n' }}",
        "{% endfor %}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ]
)


@dataclass(frozen=True)
class Function:
    name: str
    arguments: str


@dataclass(frozen=True)
class Call:
    function: Function
    id: str | None = "c1"
    type: str = "function"


def make_backend() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    return backend


def make_tokenizer(template: str | None = TEMPLATE, backend: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend or make_backend(), eos_token="<|im_end|>", bos_token="<s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def render(*messages: ChatMessage, template: str | None = TEMPLATE) -> str:
    chat_format = ChatFormat(make_tokenizer(template))
    return chat_format.backend.decode(chat_format.encode_chat(messages), skip_special_tokens=False)


def message(role: str, content: str | None = "hi", **fields: object) -> ChatMessage:
    return ChatMessage(role=Role(role), content=content, **fields)  # type: ignore[arg-type]


def failure(*messages: ChatMessage, template: str | None = TEMPLATE) -> ChatFormatError:
    with pytest.raises(ChatFormatError) as error:
        render(*messages, template=template)
    return error.value


def calling(arguments: str) -> ChatMessage:
    return message("assistant", None, tool_calls=(Call(Function("f", arguments)),))


def test_the_ids_are_those_of_transformers() -> None:
    chat_format = ChatFormat(make_tokenizer())
    conversation = [{"role": "user", "content": "héllo 😀"}, {"role": "assistant", "content": "x"}]
    expected = make_tokenizer().apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    ids = chat_format.encode_chat([message("user", "héllo 😀"), message("assistant", "x")])
    assert ids == expected
    assert all(type(token_id) is int for token_id in ids)


def test_the_prompt_ends_where_the_assistant_begins() -> None:
    assert render(message("user")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_load_reads_a_saved_tokenizer(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    messages = [message("system", "be brief"), message("user")]
    assert ChatFormat.load(str(tmp_path)).encode_chat(messages) == ChatFormat(make_tokenizer()).encode_chat(messages)


def test_load_says_when_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        ChatFormat.load(str(tmp_path))


def test_the_backend_is_the_rust_tokenizer_and_neither_truncates_nor_pads() -> None:
    backend = make_backend()
    backend.enable_truncation(5)
    backend.enable_padding(length=5000)
    chat_format = ChatFormat(make_tokenizer(backend=backend))
    assert isinstance(chat_format.backend, Tokenizer)
    assert len(chat_format.encode_chat([message("user", "x" * 100)])) == len("<user\n>\n<assistant\n") + 100


def test_a_tokenizer_without_a_rust_backend_is_an_error() -> None:
    class Slow:
        name_or_path = "somewhere"

    with pytest.raises(TokenizerError, match="somewhere"):
        ChatFormat(Slow())  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 1], ids=["before", "after"])
def test_developer_messages_are_merged_into_the_first_system_message(first: int) -> None:
    system, user, last = message("system", "S"), message("user"), message("developer", "E")
    order = [system, message("developer", "D")]
    text = render(*(order if first else reversed(order)), user, last)
    assert text.startswith("<|im_start|>system\nS\n\nD\n\nE<|im_end|>\n<|im_start|>user\n")
    assert "developer" not in text


def test_developer_messages_make_a_system_message_at_the_front_where_there_is_none() -> None:
    text = render(message("user"), message("developer", "D"), message("developer", "E"))
    assert text.startswith("<|im_start|>system\nD\n\nE<|im_end|>\n<|im_start|>user\n")


def test_a_role_given_as_a_plain_string_is_the_same_role() -> None:
    plain = ChatMessage(role="developer", content="D")  # type: ignore[arg-type]
    assert render(plain) == render(message("developer", "D"))


def test_tool_calls_reach_the_template_with_parsed_arguments() -> None:
    text = render(
        message("user"),
        message("assistant", None, tool_calls=(Call(Function("f", '{"a": 1, "b": "ü"}')), Call(Function("g", "{}")))),
        message("tool", "42", tool_call_id="c1", name="f"),
    )
    assert "<|im_start|>assistant\n\nc1 f(a=1;b=ü;)\nc1 g()<|im_end|>" in text
    assert "<|im_start|>tool f\n42 for c1<|im_end|>" in text


def test_empty_arguments_are_no_arguments() -> None:
    assert "f()" in render(calling(""))


@pytest.mark.parametrize(
    "arguments", ["{", "nope", "[" * 100_000, "[1]", '"x"', "3", "null"], ids=lambda text: text[:5]
)
def test_arguments_that_are_no_json_object_are_an_error_that_names_them(arguments: str) -> None:
    error = failure(message("developer", "D"), message("user"), calling(arguments))
    assert error.field == "messages[2].tool_calls[0].function.arguments"
    assert "JSON object" in error.message


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_chat_template_is_an_error_that_says_so(template: str | None) -> None:
    error = failure(message("user"), template=template)
    assert error.field == "messages"
    assert "no chat template" in error.message


def test_what_a_template_says_against_a_conversation_reaches_the_client() -> None:
    template = "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    error = failure(message("user"), template=template)
    assert error.field == "messages"
    assert "Conversation roles must alternate user/assistant" in error.message


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + 1 }}", "{{ messages[7].content }}", "{{ messages[0].nothing.more }}", "{% bad %}"],
)
def test_a_template_that_fails_is_an_error_of_the_conversation(template: str) -> None:
    assert failure(message("user"), template=template).field == "messages"


def test_a_conversation_of_nothing_is_an_error() -> None:
    assert failure().field == "messages"


def test_half_a_surrogate_pair_is_an_error() -> None:
    assert "surrogate" in failure(message("user", "\ud800")).message


def test_many_threads_get_what_one_gets() -> None:
    chat_format = ChatFormat(make_tokenizer())
    conversations = [[message("user", f"question {number} " + "é" * (number % 50))] for number in range(300)]
    alone = [chat_format.encode_chat(conversation) for conversation in conversations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(chat_format.encode_chat, conversations)) == alone
