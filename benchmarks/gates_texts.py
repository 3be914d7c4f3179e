"""Texts for the gates: training documents and held-out texts out of Debian packages, with a manifest of where from.

    python benchmarks/gates_texts.py --output FOLDER

Writes `train/docs.jsonl` (one {"text", "source"} a line, shuffled), `heldout/NAME.txt` (one long text each) and
`manifest.json` (package, version, licence, documents, characters, sha256). Packages are downloaded and unpacked into a
temporary folder, never installed; with the same package versions and seed, the same bytes come out.

Owns which packages and which of their pages. Training: programming documentation. Held out: other packages of other
kinds. Distribution handbooks, developers' references, desktop applications' help and music documentation are in neither
list, for they are kept for judging.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gates_pages import page_text

SHORTEST = 1_500
LONGEST = 300_000
PACKAGE_CAP = 1_600_000
HELD_OUT_CHARACTERS = 200_000
SHINGLE_WORDS = 8
# One shingle in this many is compared.
SHINGLE_SAMPLE = 8
# A document with a larger share of another kept document's shingles is its near-duplicate.
LARGEST_OVERLAP = 0.3
# A paragraph of this length seen in so many kept documents is boilerplate.
BOILERPLATE_LENGTH, BOILERPLATE_COPIES = 60, 3
_FUNCTION_WORDS = frozenset((
    "the", "of", "to", "a", "an", "is", "are", "and", "in", "for", "that", "it", "be", "this", "with", "as", "or", "if",
    "by", "on", "can", "not", "you",
))  # fmt: skip
_NOT_DOCUMENTS = re.compile(
    r"/(gen|mod|py-mod)?index(es)?\.html|/(search|contents|toc|copyright|license|licenses|all|print|bookindex|SUMMARY|"
    r"biblio|changelog|releases?|history|help|sitemap|acknowledg\w+)\.html|/_|/changelog/|/releaselog/|translations/"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package and which of its files are documents.

    Attributes:
        pages: globs below the package's root; several are read one after the other.
        licence: of the documentation, as debian/copyright has it.
        excluded: a pattern of paths that are no documents, beyond the usual ones.
        cap: characters taken at most.
        start: of a held-out text: what comes before the last of these words is title pages and contents.
    """

    name: str
    pages: tuple[str, ...]
    licence: str
    excluded: str = r"\Z\A"
    cap: int = PACKAGE_CAP
    start: str = ""


_DOC = "usr/share/doc/"
_RUST = f"{_DOC}rust-doc/html/"
_RUST_BOOKS = ("book", "nomicon", "reference", "rust-by-example", "edition-guide", "embedded-book", "rustc")
TRAINING = (
    Package("python3.11-doc", (f"{_DOC}python3.11/html/**/*.html",), "PSF-2"),
    Package(
        "postgresql-doc-15", (f"{_DOC}postgresql-doc-15/html/*.html",), "PostgreSQL", excluded=r"/release-|/errcodes"
    ),
    Package("perl-doc", ("usr/share/perl/*/pod/*.pod",), "GPL-1+ or Artistic", excluded=r"delta\.pod|perltoc|perlhist"),
    Package("linux-doc-6.1", (f"{_DOC}linux-doc-6.1/html/**/*.html",), "GPL-2", excluded=r"/sound/", cap=2_400_000),
    Package("git-doc", (f"{_DOC}git-doc/**/*.html",), "GPL-2", excluded=r"/RelNotes"),
    Package("apache2-doc", (f"{_DOC}apache2-doc/manual/en/**/*.html",), "Apache-2.0"),
    Package(
        "rust-doc",
        (*(f"{_RUST}{book}/**/*.html" for book in _RUST_BOOKS), f"{_RUST}std/*/index.html"),
        "MIT or Apache-2.0",
    ),
    Package("sqlite3-doc", (f"{_DOC}sqlite3/**/*.html",), "public-domain"),
    Package("nodejs-doc", (f"{_DOC}nodejs/api/*.html",), "Expat"),
    Package("erlang-doc", (f"{_DOC}erlang-doc/**/*.html",), "Apache-2.0", excluded=r"notes\.html|users_guide\.html"),
    Package("cmake-doc", (f"{_DOC}cmake-data/html/**/*.html",), "BSD-3-clause", excluded=r"/release/", cap=1_000_000),
    Package("python-django-doc", (f"{_DOC}python-django-doc/html/**/*.html",), "BSD-3-clause", excluded=r"/releases/"),
    Package("python-sqlalchemy-doc", (f"{_DOC}python-sqlalchemy-doc/html/**/*.html",), "Expat", cap=1_200_000),
    Package("python-flask-doc", (f"{_DOC}python-flask-doc/html/**/*.html",), "BSD-3-clause"),
    Package("swi-prolog-doc", ("usr/share/swi-prolog/doc/**/*.html",), "BSD-2-clause", cap=1_000_000),
    Package("scheme48-doc", (f"{_DOC}scheme48/html/*.html",), "BSD-3-clause"),
    Package("golang-1.19-doc", (f"{_DOC}golang-1.19-doc/html/*.html",), "BSD-3-clause", excluded=r"go1\.17_spec"),
)
HELD_OUT = {
    "anarchist-faq-essays": Package("anarchism", (f"{_DOC}anarchism/markdown/sec[A-C]*.md*",), "GPL-2"),
    "jargon-file-dictionary": Package(
        "jargon-text", (f"{_DOC}jargon-text/jargon.txt.gz",), "public-domain", start="\nChapter 1."
    ),
    "octave-manual": Package("octave-doc", ("usr/share/info/octave.info-*.gz",), "GPL-3+"),
    "gnuplot-manual": Package(
        "gnuplot-doc", ("usr/share/info/gnuplot.info.gz",), "gnuplot", start="\n1.2 Introduction\n"
    ),
    "devils-dictionary": Package(
        "dict-devil", ("usr/share/dictd/devil.dict.dz",), "public-domain", start="\nABASEMENT, n."
    ),
    "bind9-administration": Package("bind9-doc", (f"{_DOC}bind9-doc/arm/chapter[1-7].html",), "MPL-2.0"),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One page's text and where it is from: package and path."""

    text: str
    source: str


def shingles(text: str) -> set[int]:
    """Hashes of a fixed sample of the text's runs of eight words."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))
    return {value for run in runs if (value := zlib.crc32(run.encode())) % SHINGLE_SAMPLE == 0}


def is_running_text(text: str) -> bool:
    """Whether a page is English text with code, not an index, a list of names, a table of numbers or a translation."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(text) < SHORTEST or len(text) > LONGEST or sum(map(len, words)) < 0.5 * len(text):
        return False
    return sum(word in _FUNCTION_WORDS for word in words) > 0.15 * len(words)


def distinct(documents: Iterable[Document], *, cap: int, seen: set[int], paragraphs: Counter[int]) -> list[Document]:
    """The documents, up to `cap` characters, that are running text and no near-duplicates.

    `seen` and `paragraphs` carry over from package to package and grow by what is kept.
    """
    kept: list[Document] = []
    room = cap
    for document in documents:
        blocks = document.text.split("\n\n")
        marks = [zlib.crc32(block.strip().encode()) for block in blocks]
        text = "\n\n".join(
            block
            for block, mark in zip(blocks, marks, strict=True)
            if len(block) < BOILERPLATE_LENGTH or paragraphs[mark] < BOILERPLATE_COPIES
        )
        if len(text) > room or not is_running_text(text):
            continue
        sample = shingles(text)
        if len(sample & seen) > LARGEST_OVERLAP * max(1, len(sample)):
            continue
        seen |= sample
        paragraphs.update(set(marks))
        kept.append(Document(text, document.source))
        room -= len(text)
        if room < SHORTEST:
            break
    return kept


def fetch(package: str, folder: Path) -> tuple[Path, str]:
    """Downloads and unpacks a package below `folder`; its root, and its version."""
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob(f"{package}_*.deb"))
    if done.returncode or not archives:
        raise SystemExit(
            f"{package}: apt-get download failed; is it among this machine's sources? {done.stderr.strip()}"
        )
    version = subprocess.run(["dpkg-deb", "-f", archives[0], "Version"], capture_output=True, text=True, check=True)
    root = folder / package
    subprocess.run(["dpkg-deb", "-x", archives[0], root], check=True)
    return root, version.stdout.strip()


def files(package: Package, root: Path) -> list[Path]:
    """The package's files that may be documents, by name within each glob; numbers in names count as numbers."""
    excluded = re.compile(f"{_NOT_DOCUMENTS.pattern}|{package.excluded}")

    def key(path: Path) -> list[str]:
        return [part.zfill(4) if part.isdigit() else part for part in re.split(r"(\d+)", path.as_posix())]

    found = [path for glob in package.pages for path in sorted(root.glob(glob), key=key)]
    return [path for path in found if path.is_file() and not path.is_symlink() and not excluded.search(path.as_posix())]


def held_out_text(package: Package, root: Path) -> str:
    """One continuous text: the package's files in their order, cut at a paragraph."""
    text = "\n".join(page_text(path) for path in files(package, root))
    text = text[max(0, text.rfind(package.start)) if package.start else 0 :]
    return text[: text.rfind("\n\n", 0, HELD_OUT_CHARACTERS)].strip() + "\n"


def entry(package: Package, version: str, texts: list[str], written: Path) -> dict[str, str | int]:
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    row = {"package": package.name, "version": version, "licence": package.licence, "file": written.as_posix()}
    return {**row, "documents": len(texts), "characters": sum(map(len, texts)), "sha256": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=1, help="of the order and the choice of pages (default: 1)")
    options = parser.parse_args()
    for part in ("train", "heldout"):
        (options.output / part).mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str | int]]] = {"train": [], "heldout": []}
    seen: set[int] = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, package in HELD_OUT.items():
            root, version = fetch(package.name, folder)
            text = held_out_text(package, root)
            # Whatever is held out counts as seen, so that no training page repeats it.
            seen |= shingles(text)
            written = Path("heldout") / f"{title}.txt"
            (options.output / written).write_text(text)
            rows["heldout"].append(entry(package, version, [text], written))
        documents: list[Document] = []
        paragraphs: Counter[int] = Counter()
        for package in TRAINING:
            root, version = fetch(package.name, folder)
            paths = files(package, root)
            random.Random(f"{options.seed} {package.name}").shuffle(paths)
            pages = (Document(page_text(path), f"{package.name}:{path.relative_to(root)}") for path in paths)
            kept = distinct(pages, cap=package.cap, seen=seen, paragraphs=paragraphs)
            rows["train"].append(entry(package, version, [page.text for page in kept], Path("train/docs.jsonl")))
            documents += kept
            print(
                f"{package.name}: {len(kept)} of {len(paths)} pages, {sum(len(page.text) for page in kept)} characters"
            )
    random.Random(options.seed).shuffle(documents)
    lines = (json.dumps({"text": page.text, "source": page.source}, ensure_ascii=False) for page in documents)
    (options.output / "train/docs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (options.output / "manifest.json").write_text(json.dumps({"seed": options.seed, **rows}, indent=2) + "\n")
    for row in (*rows["train"], *rows["heldout"]):
        print(f"{row['package']:24} {row['version']:24} {row['documents']:6} {row['characters']:10,}  {row['licence']}")


if __name__ == "__main__":
    main()
