"""The gates' training texts and conversations: pages to text, choice of documents, and answers that can be recalled."""

from __future__ import annotations

import random
import re
from collections import Counter
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = """<!DOCTYPE html><html><head><title>Title</title><style>p {}</style></head><body>
<nav><ul><li>Home</li></ul></nav>
<main><div class="related" role="navigation"><div>previous <div>next</div></div> index</div>
<h1>Queues<a class="headerlink" href="#q">¶</a></h1>
<p>A queue   keeps&nbsp;<em>order</em>,
first in &amp; first out.</p>
<ul><li><p>put</p></li><li>get</li></ul>
<pre>
for item in queue:
    print(item)
</pre><script>track()</script></main><p>Outside.</p></body></html>"""
SENTENCES = [
    "The {0} of the {1} is kept in a {2}, and it is not to be changed by the {3}.",
    "If you are in the {0}, then the {1} that you see is the {2} of a {3}.",
    "For each {0} there is a {1}, as with the {2} that the {3} is made of.",
]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's scripts import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def prose(seed: int, sentences: int = 60) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghiklmnoprstu", k=7)) for _ in range(200)]
    said = [draw.choice(SENTENCES).format(*draw.sample(words, 4)) for _ in range(sentences)]
    return "\n\n".join(" ".join(said[i : i + 4]) for i in range(0, len(said), 4)) + "\n"


def conversations(seed: int, count: int = 60) -> list[list[dict[str, str]]]:
    module: Any = import_module("gates_conversations")
    filler = module.Filler(prose(seed) for seed in range(8))
    draw = random.Random(seed)
    return [module.conversation(draw, filler) for _ in range(count)]


def test_page_keeps_headings_paragraphs_lists_and_code_and_drops_furniture() -> None:
    text = import_module("gates_pages").html_text(PAGE)
    assert text == (
        "Queues\n\nA queue keeps order, first in & first out.\n\n- put\n\n- get\n\n"
        "for item in queue:\n    print(item)\n"
    )  # fmt: skip


def test_page_without_main_element_keeps_its_body() -> None:
    text = import_module("gates_pages").html_text(
        "<body><p>One<p>Two<br>three<div class=toc>1 <div>2</div></div></body>"
    )
    assert text == "One\n\nTwo\nthree\n"


def test_pod_and_info_lose_their_markup() -> None:
    pages = import_module("gates_pages")
    pod = (
        "=encoding utf8\n\n=head1 NAME\n\nUse B<my C<$x>> and L<the docs|perlfunc/open>, C<< a->b >>, E<lt>.\n\n=cut\n"
    )
    assert pages.pod_text(pod) == "NAME\n\nUse my $x and the docs, a->b, <.\n"
    info = (
        "Title page\n\x1f\nFile: a.info,  Node: Top,  Up: (dir)\n\nText, *note that\nnode::.\n\n* Menu:\n\n* One:: x\n"
        "\x1f\nFile: a.info,  Node: Concept Index\n\nindexed\n"
    )
    assert pages.info_text(info) == "Text, that\nnode.\n"


def test_near_duplicates_indexes_and_short_pages_are_dropped() -> None:
    texts: Any = import_module("gates_texts")
    page = prose(1)
    changed = page.replace(page.split("\n\n")[0], "A first paragraph of its own.")
    index = "\n\n".join(f"function_{n} module_{n}" for n in range(300))
    pages = [texts.Document(text, str(n)) for n, text in enumerate((page, changed, index, "Short.", prose(2)))]
    kept = texts.distinct(pages, cap=10**6, seen=set(), paragraphs=Counter())
    assert [document.source for document in kept] == ["0", "4"]


def test_what_is_held_out_counts_as_seen() -> None:
    texts: Any = import_module("gates_texts")
    pages = [texts.Document(prose(1), "held out too"), texts.Document(prose(2), "other")]
    kept = texts.distinct(pages, cap=10**6, seen=texts.shingles(prose(1)), paragraphs=Counter())
    assert [document.source for document in kept] == ["other"]


def test_cap_holds_and_repeated_paragraphs_go() -> None:
    texts: Any = import_module("gates_texts")
    notice = "This page is part of the manual, and the manual is a part of the distribution of the program."
    pages = [texts.Document(f"{prose(n)}\n\n{notice}", str(n)) for n in range(8)]
    kept = texts.distinct(pages, cap=6 * len(pages[0].text), seen=set(), paragraphs=Counter())
    assert 4 <= len(kept) <= 6
    assert sum(len(document.text) for document in kept) <= 6 * len(pages[0].text)
    assert [notice in document.text for document in kept[:5]] == [True, True, True, False, False][: len(kept)]


def test_training_and_held_out_packages_are_distinct_and_none_is_kept_for_judging() -> None:
    texts: Any = import_module("gates_texts")
    training = {package.name for package in texts.TRAINING}
    held_out = {package.name for package in texts.HELD_OUT.values()}
    assert not training & held_out
    judged = re.compile(
        r"handbook|developers-reference|debian-|maint-guide|gnome|kde|libreoffice|-help$|lilypond|csound"
    )
    assert not [name for name in training | held_out if judged.search(name)]


def test_same_seed_gives_same_conversations_and_another_seed_others() -> None:
    assert conversations(3, 10) == conversations(3, 10) != conversations(4, 10)


def test_every_asked_value_was_said_by_the_user_before() -> None:
    facts: Any = import_module("gates_facts")
    talk: Any = import_module("gates_talk")
    free = {*talk.NOTED, *talk.READ_ANSWERS, *(said for _, said in talk.TALK)}
    shapes = [
        re.compile(re.escape(template).replace(r"\{s\}", ".+").replace(r"\{v\}", value), re.IGNORECASE)
        for kind in facts.KINDS
        for template in kind.answers
        for value in ("(.+)", "(.+?)")
    ]
    checked = 0
    for messages in conversations(5, 150):
        said = ""
        for question, answer in pairwise(messages):
            text = answer["content"]
            if question["role"] != "user":
                continue
            said += question["content"] + "\n"
            if sums := re.fullmatch(r"What is (\d+) plus (\d+)\?", question["content"]):
                assert int(text) == int(sums[1]) + int(sums[2])
            elif text not in free:
                values = [text, *(found[1] for shape in shapes if (found := shape.fullmatch(text)))]
                assert any(value in said for value in values), (text, said[-500:])
                checked += 1
    assert checked > 200


def test_corrected_fact_is_answered_with_its_last_value() -> None:
    module: Any = import_module("gates_conversations")
    kinds: Any = import_module("gates_facts").KINDS
    corrections: Any = import_module("gates_talk").CORRECTIONS
    filler = module.Filler(prose(n) for n in range(8))
    shapes = [
        re.compile(re.escape(template.rstrip(".")).replace(r"\{s\}", "(?P<s>.+)").replace(r"\{v\}", "(?P<v>.+)"), re.I)
        for kind in kinds
        for template in kind.statements
    ]
    corrected = 0
    for seed in range(150):
        last: dict[tuple[str, str], None] = {}
        told = module.told(random.Random(seed), filler, 500)
        for question, answer in pairwise(told):
            text = question["content"]
            for start in filter(text.startswith, corrections):
                found = [match for shape in shapes if (match := shape.search(text.removeprefix(start)))]
                last |= {(match["s"].lower(), match["v"].removesuffix(".")): None for match in found}
            for kind in kinds if question["role"] == "user" else ():
                for asked in kind.questions:
                    match = re.search(re.escape(asked).replace(r"\{s\}", "(.+)") + "$", text, re.IGNORECASE)
                    values = [value for subject, value in last if match and match[1].lower() == subject]
                    if values:
                        corrected += 1
                        assert any(value in answer["content"] for value in values), (text, answer, values)
    assert corrected > 20


def test_reserved_wordings_occur_nowhere() -> None:
    module: Any = import_module("gates_conversations")
    facts: Any = import_module("gates_facts")
    bad = (
        "The access token of a user is the one that the server has seen, and it is not to be shown to the others. " * 2
    )
    filler = module.Filler([*(prose(n) for n in range(8)), *[bad.strip()] * 200])
    draw = random.Random(1)
    text = "\n".join(m["content"] for _ in range(100) for m in module.conversation(draw, filler)).lower()
    assert not [wording for wording in facts.RESERVED if wording in text]


def test_templates_are_many_and_complete() -> None:
    kinds: Any = import_module("gates_facts").KINDS
    assert len(kinds) >= 12
    assert sum(len(kind.statements) + len(kind.questions) for kind in kinds) >= 60
    for kind in kinds:
        assert all("{s}" in text and "{v}" in text for text in kind.statements)
        assert all("{s}" in text and "{v}" not in text for text in kind.questions)
        assert all("{v}" in text for text in kind.answers)
