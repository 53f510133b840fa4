"""Bring what lies outside docs/ into the site: executed notebooks as pages, CONTRIBUTING.md, files that pages link to.

Pages link to those as they lie in the repository (``../notebooks/01_first_run.ipynb``), so that they can be read there
too; the site's links are rewritten to its own copies. A link to a file that is not there stays, and fails the build.
"""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

from formulas import Formulas  # this folder is on the path while a hook is loaded
from properdocs.config.defaults import MkDocsConfig
from properdocs.structure.files import File, Files
from properdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"notebooks/{path.name}": f"notebooks/{path.stem}.md"
        for path in sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))
    },
}
"""Files outside docs/ that are pages of the site."""
FIGURE = re.compile(r'<p>(<img [^>]*?src="([^"]+)"[^>]*>)</p>')
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.append(Formulas())  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        if source.endswith(".ipynb"):
            text, pictures = page_of(json.loads((ROOT / source).read_text()), Path(source).stem)
            for name, picture in pictures.items():
                files.append(File.generated(config, f"notebooks/{name}", content=picture))
        else:
            text = (ROOT / source).read_text()
        files.append(File.generated(config, target, content=text))
    for source in sorted(_linked(files) - PAGES.keys()):
        if (ROOT / source).is_file():
            copy = File.generated(config, f"files/{source}", abs_src_path=str(ROOT / source))
            files.append(copy)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri

    def rewritten(found: re.Match) -> str:
        source = _in_repository(found[1], here)
        target = PAGES.get(source, f"files/{source}")
        if source.startswith("docs/"):
            target = source.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return found[0]
        return os.path.relpath(target, os.path.dirname(here) or ".")

    shown = markdown.replace(
        'title="not run: ', 'title="'
    )  # why the tests leave a snippet out; readers need the reason
    return LINK.sub(rewritten, shown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link every figure to its file, so that a click shows it in full size."""
    return FIGURE.sub(r'<p><a class="figure" href="\2">\1</a></p>', html)


def page_of(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and its pictures by file name."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Figure {len(pictures)} of this notebook]({picture})")
            elif "text/html" in data:
                parts.append(_table("".join(data["text/html"])))
            else:
                shown = "".join(output.get("text") or data.get("text/plain", [])).rstrip()
                parts.append(f"```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _table(html: str) -> str:
    """A data frame's HTML without its own style and without blank lines, which would end it for Markdown."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r' (border="1"|class="dataframe"|style="[^"]*")', "", html)
    return "\n".join(line.strip() for line in html.splitlines() if line.strip())


def _linked(files: Files) -> set[str]:
    """Files of the repository, outside docs/, that the site's pages link to."""
    targets = set()
    for file in files.documentation_pages():
        for target in LINK.findall(file.content_string):
            source = _in_repository(target, file.src_uri)
            if not source.startswith((".", "docs/")):
                targets.add(source)
    return targets


def _in_repository(target: str, page: str) -> str:
    """Where a link leads to, from the repository's root; the page is named as in the site."""
    homes = {copy: source for source, copy in PAGES.items()}
    return os.path.normpath(os.path.join(os.path.dirname(homes.get(page, f"docs/{page}")), target))
