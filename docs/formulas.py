"""Formulas in plain Unicode, as the pages and docstrings have them: ``θ_{t−τ}``, ``L_θx``, ``x*_i`` with real indices.

Markdown proper leaves them alone, but Python's Markdown would take their underscores and stars for emphasis.
"""

import re
import xml.etree.ElementTree as etree
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.postprocessors import Postprocessor

# A symbol is one letter, with its accent or star, that does not end a word: conadv_lab has no index.
SYMBOL = r"(?<![A-Za-z_])([^\W\d_]|[∇Σ])([\u0300-\u036f]?)"
BELOW = r"_(?:\{([^{}]+)\}|([A-Za-zα-ω]+|\d+))"
INDEX = rf"{SYMBOL}(\*?){BELOW}(?:\^\{{([^{{}}]+)\}})?"
STAR = rf"(?<!\*){SYMBOL}\*(?![*\w])"


class Index(InlineProcessor):
    """θ_{t−τ} and x*_i: the letter with its accent, the star above, the index below, an upper limit above."""

    def handleMatch(self, m: re.Match, data: str) -> Any:
        letter, accent, star, braced, plain, limit = m.groups()
        formula = etree.Element("span")
        formula.text = letter + accent
        above = star or limit
        for tag, text in (("sup", above if star else None), ("sub", braced or plain), ("sup", limit)):
            if text:
                etree.SubElement(formula, tag).text = text
        return formula, m.start(0), m.end(0)


class Star(InlineProcessor):
    """x*: the star of a maximiser."""

    def handleMatch(self, m: re.Match, data: str) -> Any:
        formula = etree.Element("span")
        formula.text = m[1] + m[2]
        etree.SubElement(formula, "sup").text = "*"
        return formula, m.start(0), m.end(0)


class Displayed(Postprocessor):
    """Formulas in blocks: where there are such symbols, indices too."""

    def run(self, text: str) -> str:
        return re.sub(r"(?s)(<pre>.*?</pre>)", lambda block: self._indexed(block[0]), text)

    def _indexed(self, block: str) -> str:
        if not re.search("[θ∇ℓ‖κ]", block):
            return block
        return re.sub(INDEX, self._index, re.sub(STAR, r"\1\2<sup>*</sup>", block))

    def _index(self, m: re.Match) -> str:
        letter, accent, star, braced, plain, limit = m.groups()
        above = f"<sup>{star or limit}</sup>" if star or limit else ""
        return f"{letter}{accent}<sub>{braced or plain}</sub>{above}"


class Formulas(Extension):
    """After code, links and HTML (priorities 190 to 80), before emphasis (70 and less); blocks at the very end."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(Index(INDEX, md), "formula-index", 75)
        md.inlinePatterns.register(Star(STAR, md), "formula-star", 74)
        md.postprocessors.register(Displayed(md), "formula-blocks", 5)
