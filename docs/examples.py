"""Make Markdown of docstrings: examples in fences, Sphinx's roles as code, formulas such as clip[0,1](x) no links."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)
ROLE = re.compile(r":\w+:`~?\.*([^`]+)`")


class Examples(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The docstring as Markdown, where a bare ``>>>`` would be a quotation and ``[0,1](x)`` a link."""
    text = ROLE.sub(r"`\1`", docstring.replace("](", r"\]("))
    return EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", text)
