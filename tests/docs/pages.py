"""What the tests read of the documents: pages, their fences and their code in lines, from Markdown and notebooks."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\S*)[ ]*([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "console")


@dataclass(frozen=True)
class Page:
    """A document: its path from the repository's root, and its Markdown, of a notebook that of its text cells."""

    path: str
    text: str

    @property
    def prose(self) -> str:
        """The text without what stands in fences."""
        return FENCE.sub("", self.text)

    def fences(self, *languages: str) -> Iterator[tuple[str, str]]:
        """(rest of the fence's first line, content) of the fences in these languages."""
        for language, rest, content in FENCE.findall(self.text):
            if language in languages:
                yield rest, content

    def shell(self) -> list[str]:
        """Lines that a shell could be given: those of shell fences, continued ones joined, and code within lines."""
        lines = [
            line.partition(" #")[0].strip()
            for _, content in self.fences(*SHELL)
            for line in content.replace("\\\n", " ").splitlines()
        ]
        within = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", self.prose)
        return [line for line in lines if line] + [" ".join(code.split()) for code in within]


def markdown() -> list[Page]:
    """README, CONTRIBUTING and the site's pages."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [Page(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths]


def notebooks() -> list[Page]:
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        found.append(Page(str(path.relative_to(ROOT)), text))
    return found
