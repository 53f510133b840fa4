"""The documents' Python runs, each snippet on its own; one that does not says why in its fence's title."""

import re

import pytest

from tests.docs.pages import Page, markdown

LEFT_OUT = re.compile(r'title="not run: [^"]{10,}"')
SNIPPETS = [
    pytest.param(page.path, rest, code, id=f"{page.path}-{number}")
    for page in markdown()
    for number, (rest, code) in enumerate(page.fences("python", "py", "pycon"))
]


def run(name: str, rest: str, code: str) -> None:
    """Run a snippet, unless its fence says ```` ```python title="not run: a reason" ````."""
    if rest:
        assert LEFT_OUT.fullmatch(rest), f"{name}: {rest}"
        return
    exec(compile(code, name, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize(("name", "rest", "code"), SNIPPETS)
def test_snippets_run(name, rest, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(name, rest, code)


def test_readme_guide_and_simulator_have_snippets():
    assert {"README.md", "docs/guide.md", "docs/staleness.md"} <= {snippet.values[0] for snippet in SNIPPETS}


def test_a_stale_snippet_is_found():
    page = Page("page.md", "```python\nimport conadv_lab as cl\ncl.ConAdvv()\n```\n")
    ((rest, code),) = page.fences("python")
    with pytest.raises(AttributeError, match="ConAdvv"):
        run(page.path, rest, code)


def test_a_snippet_is_left_out_for_a_reason_only():
    run("page.md", 'title="not run: it needs a GPU"', "1 / 0")
    for rest in ('title="not run: "', "norun"):
        with pytest.raises(AssertionError):
            run("page.md", rest, "1 / 0")
