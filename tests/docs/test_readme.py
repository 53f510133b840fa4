"""The README stays short enough to be read, and its sentences plain enough."""

import re

import pytest

from tests.docs.pages import ROOT

LINES, WORDS = 130, 30
README = (ROOT / "README.md").read_text(encoding="utf-8")


def long_sentences(text: str) -> list[str]:
    """Sentences of the prose with more than `WORDS` words; an interval such as "+0.5 (+0.2 to +0.7)" is one word."""
    text = re.sub(r"```.*?```|<!--.*?-->|^\|.*?$|!\[.*?\]\(.*?\)", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|[*`\[\]]", "", text)
    text = re.sub(r"[+−]?[\d.]+ \([^)]* to [^)]*\)", "interval", text)
    paragraphs = re.split(r"\n\s*\n|\n#|\n- ", text)
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?:;])\s+|\s·\s", " ".join(p.split()))]
    return [sentence for sentence in sentences if len(sentence.split()) > WORDS]


def test_it_is_short():
    assert README.count("\n") <= LINES


def test_its_sentences_are_short():
    assert long_sentences(README) == []


@pytest.mark.parametrize("words", [WORDS, WORDS + 1])
def test_a_long_sentence_is_found(words):
    text = f"# Title\n\nShort one. {'word ' * (words - 1)}end.\n\n```\n{'code ' * 50}\n```\n"
    assert len(long_sentences(text)) == (words > WORDS)
