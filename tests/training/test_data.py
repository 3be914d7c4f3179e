from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.training.tiny_text import FORGETFUL_TEMPLATE, TEMPLATE, chat, make_text, make_tokenizer, write_lines
from trimkv_core.training.data import open_data
from trimkv_core.training.documents import DataError, Document, Message
from trimkv_core.training.encoding import DocumentEncoder, DocumentStore

SECTION = 1 << 20


def read_all(*names: object) -> list[Document]:
    groups = open_data([str(name) for name in names], section_bytes=SECTION)
    return [source.read(index) for group in groups for source in group for index in range(len(source))]


def complaint(*names: object) -> str:
    with pytest.raises(DataError) as caught:
        read_all(*names)
    return str(caught.value)


class TestFiles:
    def test_a_text_file_is_one_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\ftwo\n")
        assert [document.text for document in read_all(tmp_path / "a.txt")] == ["one\ftwo\n"]

    def test_a_folder_is_all_its_known_files_in_order_of_their_paths(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "b.md").write_text("b")
        (tmp_path / "sub" / "a.txt").write_text("a")
        (tmp_path / "picture.png").write_bytes(b"\x89PNG")
        (tmp_path / ".hidden.txt").write_text("hidden")
        write_lines(tmp_path / "c.jsonl", {"text": "c"})
        assert [document.text for document in read_all(tmp_path)] == ["b", "c", "a"]

    def test_lines_are_texts_or_conversations_and_empty_ones_are_left_out(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"text": "one", "source": "x"}, chat("q", "a"))
        path.write_text(path.read_text().replace("\n", "\n\n"))
        first, second = read_all(path)
        assert first.text == "one"
        assert second.messages == (Message("user", "q"), Message("assistant", "a"))
        assert second.where.endswith("a.jsonl, line 3")

    def test_a_json_list_holds_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": "one"}, chat("q", "a")]))
        assert [document.text for document in read_all(path)] == ["one", None]

    def test_records_name_contents_and_size(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"abc")
        record = open_data([str(tmp_path / "a.txt")], section_bytes=SECTION)[0][0].record
        assert record.size == 3
        assert record.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    @pytest.mark.parametrize("text", ["word " * 40 + "\n" + "é" * 300, "é" * 301, "漢字\n" * 70])
    def test_sections_of_a_long_text_are_the_text_again(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        source = open_data([str(tmp_path / "a.txt")], section_bytes=101)[0][0]
        sections = [source.read(index).text or "" for index in range(len(source))]
        assert len(sections) > 4
        assert "".join(sections) == text
        assert all(len(section.encode()) <= 101 for section in sections)

    def test_sections_end_with_lines_where_there_are_any(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("0123456789\n" * 20)
        source = open_data([str(tmp_path / "a.txt")], section_bytes=50)[0][0]
        assert source.read(0).text == "0123456789\n" * 4


class TestComplaints:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "no file or folder" in complaint(tmp_path / "a.txt")

    def test_an_unknown_format_names_the_known_ones(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("a,b")
        assert "a.csv ends in '.csv': known formats are .txt, .md, .jsonl, .json" in complaint(tmp_path / "a.csv")

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        assert "holds no file that ends in" in complaint(tmp_path)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("")
        assert "a.txt holds no documents" in complaint(tmp_path / "a.txt")

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine \xff")
        assert "a.txt is not UTF-8: it holds the byte 0xff" in complaint(tmp_path / "a.txt")

    def test_a_character_cut_off_at_the_end(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("é".encode()[:1])
        assert "is not UTF-8" in complaint(tmp_path / "a.txt")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ('{"text": "a"', "line 2 is not JSON"),
            ('{"txt": "a"}', 'line 2 holds "txt": it must hold either "text"'),
            ('{"text": "a", "messages": []}', 'line 2 holds "text", "messages": it must hold either'),
            ("[1]", "line 2 holds a list"),
            ('{"text": 3}', 'line 2 has a number as its "text": it must be a string'),
            ('{"text": "\\ud800"}', "half of a surrogate pair"),
            ('{"messages": []}', "line 2 has an empty list"),
            ('{"messages": ["a"]}', "line 2, message 1 is a string"),
            ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1 has the role 'bot': allowed are system,"),
            ('{"messages": [{"role": "user", "content": null}]}', 'message 1 has nothing as its "content"'),
        ],
    )
    def test_a_bad_line_is_found_at_the_start_and_named(self, tmp_path: Path, line: str, expected: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "good"}\n' + line + "\n")
        message = complaint(path)
        assert message.startswith(str(path))
        assert expected in message

    def test_a_json_file_that_is_no_list(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"text": "a"}')
        assert "a.json holds an object: it must hold a list" in complaint(tmp_path / "a.json")


class TestDatasets:
    class Rows:
        """As much of a loaded data set as is used."""

        _fingerprint = "f00d"

        def __init__(self, **columns: list[Any]) -> None:
            self._columns = columns
            self.column_names = list(columns)

        def __len__(self) -> int:
            return len(next(iter(self._columns.values())))

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: values[index] for name, values in self._columns.items()}

    def offer(self, monkeypatch: pytest.MonkeyPatch, rows: Rows) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def load_dataset(name: str, *, split: str) -> TestDatasets.Rows:
            asked.append((name, split))
            return rows

        module = ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    def test_split_and_column_are_taken_from_the_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.offer(monkeypatch, self.Rows(text=["no"], body=["one"]))
        (document,) = read_all("datasets:owner/name:test:body")
        assert (document.text, document.where) == ("one", "datasets:owner/name:test:body, row 0")
        assert asked == [("owner/name", "test")]

    def test_the_usual_columns_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.offer(monkeypatch, self.Rows(messages=[chat("q", "a")["messages"]]))
        assert len(read_all("datasets:name")[0].messages) == 2
        assert asked == [("name", "train")]

    def test_a_missing_column_names_those_there_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offer(monkeypatch, self.Rows(a=[""], b=[""]))
        assert "its columns are a, b" in complaint("datasets:name")

    def test_without_the_package_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert "pip install datasets" in complaint("datasets:name")


class TestEncoding:
    def encoder(self, *, assistant_only: bool = False, **options: Any) -> DocumentEncoder:
        return DocumentEncoder(make_tokenizer(**options), learns_assistant_only=assistant_only)

    def conversation(self, *turns: tuple[str, str]) -> Document:
        return Document("here", None, tuple(Message(role, content) for role, content in turns))

    def test_texts_are_bare_and_the_tokenizers_own_beginning_is_kept_apart(self) -> None:
        encoder = self.encoder(has_bos=True)
        encoded = encoder.encode(Document("here", "ab"))
        assert encoder.prefix.tolist() == [1]
        assert make_tokenizer().decode(encoded.ids) == "ab"
        assert self.encoder().prefix.tolist() == []

    def test_conversations_go_through_the_template(self) -> None:
        encoded = self.encoder(has_bos=True).encode(self.conversation(("user", "hi"), ("assistant", "yo")))
        text = make_tokenizer().decode(encoded.ids, skip_special_tokens=False)
        assert text == "<im_start>user\nhi<im_end>\n<im_start>assistant\nyo<im_end>\n"
        assert encoded.counted is None
        assert not encoded.is_text

    def test_only_the_assistants_turns_count_where_that_is_asked_for(self) -> None:
        turns = (("user", "hé"), ("assistant", "eins"), ("user", "more"), ("assistant", "zwei"))
        encoded = self.encoder(assistant_only=True).encode(self.conversation(*turns))
        assert encoded.counted is not None
        counted = make_tokenizer().decode(encoded.ids[encoded.counted], skip_special_tokens=False)
        assert counted == "eins<im_end>\nzwei<im_end>\n"

    def test_a_template_that_marks_what_is_generated_is_believed(self) -> None:
        marking = TEMPLATE.replace(
            "{{ message['content'] }}",
            "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
            "{% else %}{{ message['content'] }}{% endif %}",
        )
        encoder = self.encoder(assistant_only=True, template=marking)
        encoded = encoder.encode(self.conversation(("user", "hi"), ("assistant", "eins")))
        assert encoded.counted is not None
        assert make_tokenizer().decode(encoded.ids[encoded.counted]) == "eins"

    def test_turns_that_cannot_be_told_apart_are_refused_by_name(self) -> None:
        encoder = self.encoder(assistant_only=True, template=FORGETFUL_TEMPLATE)
        with pytest.raises(DataError, match=r"here: .* message 2 .* --chat-loss all"):
            encoder.encode(self.conversation(("user", "a"), ("assistant", "b"), ("user", "c")))

    def test_without_a_template_conversations_are_refused(self) -> None:
        with pytest.raises(DataError, match="no chat template"):
            self.encoder(template=None).encode(self.conversation(("user", "a")))

    def test_a_template_that_refuses_is_quoted(self) -> None:
        with pytest.raises(DataError, match="here: the chat template cannot render the conversation: no systems"):
            self.encoder(template="{{ raise_exception('no systems') }}").encode(self.conversation(("system", "a")))


class TestStore:
    def store(self, tmp_path: Path, *texts: str) -> DocumentStore:
        path = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
        encoder = DocumentEncoder(make_tokenizer(), learns_assistant_only=False)
        return DocumentStore(open_data([str(path)], section_bytes=SECTION), encoder)

    def test_documents_too_short_are_counted(self, tmp_path: Path) -> None:
        store = self.store(tmp_path, "", "a", "ab", "abc")
        for number in range(len(store)):
            store.get(number)
        assert store.too_short == {0, 1}

    def test_too_few_tokens_for_a_step_are_said_with_their_number(self, tmp_path: Path) -> None:
        store = self.store(tmp_path, "a", "ab", "abc")
        store.check_enough(5)
        with pytest.raises(DataError, match=r"5 tokens in 3 documents \(1 of them .*one step takes 6"):
            store.check_enough(6)

    def test_only_as_much_is_tokenised_as_a_step_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.store(tmp_path, *(make_text(50, seed) for seed in range(100)))
        encoded: list[str] = []
        encode = DocumentEncoder.encode
        monkeypatch.setattr(
            DocumentEncoder, "encode", lambda self, document: encoded.append(document.where) or encode(self, document)
        )
        store.check_enough(120)
        store.check_enough(120)
        assert len(encoded) == 3

    def test_ids_are_held_in_four_bytes(self, tmp_path: Path) -> None:
        assert self.store(tmp_path, "abc").get(0).ids.dtype == np.int32
