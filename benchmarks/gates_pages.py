"""Plain text out of documentation pages: HTML, POD, info and text files, gzipped or not.

Owns what of a page is running text and what is furniture (navigation, tables of contents, scripts, search boxes). Knows
no package and no training. A page stays whole: headings, paragraphs, lists and code blocks in their order.
"""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser
from pathlib import Path


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SKIPPED_TAGS = _names("nav script style head svg form button select template noscript iframe footer")
_UNSKIPPED_TAGS = _names("body br img input hr")
_PARAGRAPHS = _names("p div section article pre table ul ol dl blockquote h1 h2 h3 h4 h5 h6 main hr")
_LINES = _names("li tr dt dd br")
# Ids and classes under which the generators of these pages (Sphinx, DocBook, mdBook, rustdoc …) put furniture.
_FURNITURE = _names("""
    sphinxsidebar related toctree-wrapper contents navheader navfooter toc footer headerlink toplang bottomlang
    menu-bar quickview column2 gtoc path up top api_metadata picker sidebar searchresults-outer search-wrapper
    theme-list mark fancy_toc fancy-toc1 fancy-toc2 fancy-toc3 language_switcher_placeholder
    version_switcher_placeholder inline-search nav nav-wrapper src srclink anchor rust-logo
    type_signature_toggle navigation nosearch toctree indextable leftnav sidebar-elems mobile-topbar sub
    page-header hamburger tabs menu out-of-band since wy-breadcrumbs wy-nav-side rst-footer-buttons hd ft
    global-nav""")
_MAIN = re.compile(r"""<main\b|role=["']main["']""")
_NO_BREAK = dict.fromkeys(map(ord, "\u200b\u00ad\ufeff¶"))


class _Page(HTMLParser):
    """Collects the text of a page; a skipped or main element ends where its tag, counted, closes."""

    def __init__(self, *, has_main: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._main = "" if has_main else "html"
        self._main_depth = 0
        self._skipped = ""
        self._skip_depth = 0
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._skip_depth += tag == self._skipped
            return
        values = dict(attrs)
        if not self._main and (tag == "main" or values.get("role") == "main"):
            self._main = tag
        if tag == self._main:
            self._main_depth += 1
        names = {values.get("id") or "", *(values.get("class") or "").split()}
        furniture = tag in _SKIPPED_TAGS or names & _FURNITURE or values.get("role") in {"navigation", "search"}
        if furniture and tag not in _UNSKIPPED_TAGS:
            self._skipped, self._skip_depth = tag, 1
            return
        self._break(tag)
        if tag in _LINES:
            self.parts.append("\n")
        if tag == "pre":
            self._pre_depth += 1
        elif tag == "li":
            self.parts.append("- ")
        elif tag in {"td", "th"}:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._skip_depth -= tag == self._skipped
            if not self._skip_depth:
                self._skipped = ""
            return
        if tag == self._main and tag != "html":
            self._main_depth -= 1
            if not self._main_depth:
                self._main = "-"
        if tag == "pre":
            self._pre_depth = max(0, self._pre_depth - 1)
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._skipped or (self._main != "html" and not self._main_depth):
            return
        if not self._pre_depth:
            data = re.sub(r"\s+", " ", data)
            if self.parts and self.parts[-1][-1:] in {"\n", " "}:
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self.parts.append("\n\n")


def html_text(html: str) -> str:
    """The running text of a page: inside its main element where it has one, without furniture."""
    page = _Page(has_main=bool(_MAIN.search(html)))
    page.feed(html)
    page.close()
    return tidy("".join(page.parts))


def pod_text(pod: str) -> str:
    """The text of Perl's POD: headings and items without their commands, formatting codes unwrapped."""
    text = re.sub(r"(?ms)^=(?:begin|for)\b.*?^=end\b[^\n]*\n|^=(?:encoding|over|back|cut|pod|for)\b[^\n]*\n", "", pod)
    text = re.sub(r"(?m)^=(?:head\d|item)[ \t]*", "", text)
    text = re.sub(r"\bE<(lt|gt|sol|verbar)>", lambda code: {"lt": "‹", "gt": "›", "sol": "/"}.get(code[1], "|"), text)
    text = re.sub(r"\b[XZ]<[^<>]*>", "", text)
    text = re.sub(r"\bL<(?:([^|<>]*)\|)?([^<>]*)>", lambda link: link[1] or link[2], text)
    for _ in range(3):
        text = re.sub(r"\b[BCFIS]<<+ (.*?) >+>", r"\1", text, flags=re.DOTALL)
        text = re.sub(r"\b[BCFIS]<([^<>]*)>", r"\1", text)
    return tidy(text.replace("‹", "<").replace("›", ">"))


def info_text(info: str) -> str:
    """The text of an info file: nodes in their order, without node lines, menus and the indexes at the end."""
    nodes = info.split("\x1f\n")[1:]
    kept = []
    for node in nodes:
        header, _, body = node.partition("\n")
        if not header.startswith("File:") or "Index" in header or "Tag Table" in header:
            continue
        body = re.sub(r"(?ms)^\* Menu:.*\Z", "", body)
        kept.append(re.sub(r"\*[Nn]ote\s+([^:]+)(?:::|:\s+[^.,]+(?=[.,]))", r"\1", body))
    return tidy("\n\n".join(kept))


def tidy(text: str) -> str:
    """Text with single blank lines, no trailing spaces and no invisible characters."""
    text = text.replace("\r\n", "\n").replace("\xa0", " ").translate(_NO_BREAK)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"(?m)^-\n+(?=[^-\n])", "- ", text)
    text = re.sub(r"(?m)^(?:- )*-$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n ") + "\n"


def page_text(path: Path) -> str:
    """The text of a file, by what its name says it is."""
    raw = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        raw = gzip.decompress(raw)
        path = path.with_suffix("")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if path.suffix in {".html", ".htm"}:
        return html_text(text)
    if path.suffix == ".pod":
        return pod_text(text)
    return info_text(text) if ".info" in path.name else tidy(text)
