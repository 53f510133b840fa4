"""Links in README, CONTRIBUTING, docs and notebooks lead to files and headings that are there; no network is asked."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Page, markdown, notebooks

LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
PAGES = [*markdown(), *notebooks()]


def dead(page: Page, root: Path = ROOT) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", page.prose)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (root / page.path).parent / target if target else root / page.path
        if not file.exists() or (anchor and anchor not in headings(file)):
            found.append(link)
    return found


def headings(file: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as code hosts and the site make them."""
    titles = re.findall(r"^#+ +(.+?) *$", Page("", file.read_text(encoding="utf-8")).prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_links_lead_somewhere(page):
    assert dead(page) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# It is there\n\n```\n# no heading\n```\n")
    page = Page(
        "page.md",
        "[a](there.md#it-is-there) [b](https://example.org/x) [c](gone.md) [d](there.md#no-heading) `[e](f)`",
    )
    assert dead(page, tmp_path) == ["gone.md", "there.md#no-heading"]


def test_nothing_is_left_to_be_filled_in():
    assert not [page.path for page in PAGES if "@@" in page.text or "TODO" in page.text]
