"""Where training texts come from: files, folders and the `datasets` package; and every complaint about them.

Owns how documents are found, checked once at the start and read one at a time. Knows no tokenizer: a document is text
or a conversation.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimkv_core.training.documents import SHAPES, DataError, Document, named, not_utf8, parse_document, parse_line

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json")
DATASETS_PREFIX = "datasets:"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """What a run writes down about a source: `size` in bytes for files, in documents for a data set."""

    name: str
    sha256: str
    size: int


class Source(Protocol):
    """Documents that can be read in any order."""

    @property
    def record(self) -> SourceRecord: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Document: ...


def open_data(names: Sequence[str], *, section_bytes: int) -> list[list[Source]]:
    """The sources behind each of `names`; every file is read through and checked once.

    Args:
        names: files, folders (of such, at any depth) or `datasets:NAME[:SPLIT[:COLUMN]]`.
        section_bytes: a longer text is served as several documents, cut at line ends, so that the first step need not
            wait until all of it is tokenised.

    Raises:
        DataError: nothing there, an unknown format, or contents that are no documents.
    """
    opened = []
    for name in names:
        if name.startswith(DATASETS_PREFIX):
            sources: list[Source] = [DatasetSource(name)]
        else:
            sources = [_open_file(path, section_bytes) for path in _files(name)]
        if not sum(len(source) for source in sources):
            raise DataError(f"{name} holds no documents")
        opened.append(sources)
    return opened


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        taken = [file for file in found if file.suffix.lower() in SUFFIXES]
        if not taken:
            raise DataError(f"{name} holds no file that ends in {', '.join(SUFFIXES)}")
        if len(taken) < len(found):
            logger.info("%s: %d files of other formats are left out", name, len(found) - len(taken))
        return taken
    if not path.is_file():
        raise DataError(
            f"no file or folder {name!r}; --data takes files that end in {', '.join(SUFFIXES)}, folders of these, or "
            f"{DATASETS_PREFIX}NAME[:SPLIT[:COLUMN]]"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{name} ends in {path.suffix or 'nothing'!r}: known formats are {', '.join(SUFFIXES)}")
    return [path]


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _open_file(path: Path, section_bytes: int) -> Source:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return JsonLines(path)
        return JsonList(path) if suffix == ".json" else TextFile(path, section_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


class TextFile:
    """A text file: one document, or one for each of its sections if it is longer than one."""

    def __init__(self, path: Path, section_bytes: int) -> None:
        self._path = path
        digest, decoder, size = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    raise DataError(not_utf8(str(path), error)) from None
                size += len(block)
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(str(path), error)) from None
        self.record = SourceRecord(str(path), digest.hexdigest(), size)
        self._starts = _section_starts(path, size, section_bytes)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> Document:
        start, stop = self._starts[index], self._starts[index + 1]
        with self._path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start).decode("utf-8").removeprefix("\ufeff")
        where = str(self._path) if len(self) == 1 else f"{self._path}, bytes {start} to {stop}"
        return Document(where, text)


def _section_starts(path: Path, size: int, section_bytes: int) -> list[int]:
    """Where sections begin, and the end: after the last line end of each `section_bytes`, else between characters."""
    starts = [0]
    with path.open("rb") as file:
        while size - starts[-1] > section_bytes:
            file.seek(starts[-1])
            block = file.read(section_bytes)
            cut = block.rfind(b"\n") + 1
            if cut == 0:
                cut = len(block)
                after = file.read(1)
                while after and 0x80 <= after[0] < 0xC0:  # the middle of a character
                    cut -= 1
                    after = block[cut : cut + 1]
            starts.append(starts[-1] + cut)
    return [*starts, size] if size else [0]


class JsonLines:
    """A `.jsonl` file: a document each line; empty lines are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        digest, at = hashlib.sha256(), 0
        self._lines: list[tuple[int, int, int]] = []  # number, first byte, bytes
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    parse_line(line, f"{path}, line {number}")
                    self._lines.append((number, at, len(line)))
                at += len(line)
        self.record = SourceRecord(str(path), digest.hexdigest(), at)

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> Document:
        number, at, size = self._lines[index]
        with self._path.open("rb") as file:
            file.seek(at)
            line = file.read(size)
        return parse_line(line, f"{self._path}, line {number}")


class JsonList:
    """A `.json` file: a list of documents, held in memory."""

    def __init__(self, path: Path) -> None:
        contents = path.read_bytes()
        try:
            items = json.loads(contents.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(not_utf8(str(path), error)) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        if not isinstance(items, list):
            raise DataError(f"{path} holds {named(items)}: it must hold a list of objects with {SHAPES}")
        self._documents = [parse_document(item, f"{path}, item {number}") for number, item in enumerate(items, start=1)]
        self.record = SourceRecord(str(path), hashlib.sha256(contents).hexdigest(), len(contents))

    def __len__(self) -> int:
        return len(self._documents)

    def read(self, index: int) -> Document:
        return self._documents[index]


class DatasetSource:
    """A data set of the `datasets` package, `datasets:NAME[:SPLIT[:COLUMN]]`."""

    def __init__(self, name: str) -> None:
        location, split, column = [*name.removeprefix(DATASETS_PREFIX).split(":"), "", ""][:3]
        if not location or name.count(":") > 3:
            raise DataError(f"{name!r} names no data set: write {DATASETS_PREFIX}NAME[:SPLIT[:COLUMN]]")
        self._name = name
        self._rows = _load_dataset(name, location, split or "train")
        columns = list(self._rows.column_names)
        self._column = column or next((known for known in ("messages", "text") if known in columns), "")
        if self._column not in columns:
            asked = f"no column {column!r}" if column else "neither a column 'text' nor 'messages'"
            raise DataError(f"{name} has {asked}: its columns are {', '.join(columns)}; name one as the last part")
        # What `datasets` knows a version of the data by.
        digest = hashlib.sha256(str(getattr(self._rows, "_fingerprint", name)).encode()).hexdigest()
        self.record = SourceRecord(name, digest, len(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Document:
        value = self._rows[index][self._column]
        key = "text" if isinstance(value, str) else "messages"
        return parse_document({key: value}, f"{self._name}, row {index}")


def _load_dataset(name: str, location: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install datasets") from None
    try:
        return datasets.load_dataset(location, split=split)
    except Exception as error:  # the package raises a dozen types, and all mean the same here
        raise DataError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
