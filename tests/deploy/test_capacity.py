from __future__ import annotations

import re

from deploy.capacity import CARDS, MARK, PAGE, with_plans


def test_the_page_says_what_the_plan_says() -> None:
    page = PAGE.read_text()
    assert with_plans(page) == page, "python -m deploy.capacity"


def test_the_tables_of_the_page_are_the_plans_own_figures() -> None:
    prose, plans, _ = PAGE.read_text().split(MARK)
    rows = re.findall(r"^\| (\d+) GB \| (.+) \|$", prose, re.MULTILINE)
    assert [int(size) for size, _ in rows] == list(CARDS)
    for (size, cells), section in zip(rows, plans.split("### ")[1:], strict=True):
        assert section.startswith(f"{size} GB")
        budgeted, *dense = [cell.strip() for cell in cells.split("|")]
        assert counts(section, "512*") == [budgeted] * 3
        assert counts(section, "dense") == dense


def counts(section: str, name: str) -> list[str]:
    """Sequences that fit, by context length, of one row of a plan's first table."""
    line = next(line for line in section.splitlines() if line.split()[:1] == [name])
    return re.findall(r"([\d,]+) \(", line)
