"""The examples on the adapters' pages."""

from tests.docs.pages import ROOT, Page

PAGES = {
    "lightning": "lightning.md",
    "transformers": "huggingface.md",
    "accelerate": "accelerate.md",
    "torch": "ddp.md",
}
"""A library's page in docs/."""


def of(library: str) -> str:
    """The one Python block of a library's page."""
    file = f"docs/{PAGES[library]}"
    ((_, code),) = Page(file, (ROOT / file).read_text(encoding="utf-8")).fences("python")
    return code
