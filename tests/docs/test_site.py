"""The site builds strictly, holds every public name, needs no network to be read, and has no dead ends."""

import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

import conadv_lab
from conadv_lab import sharpness, staleness
from tests.docs.pages import ROOT

pytest.importorskip("properdocs", reason="the extra [docs] is not installed")
import_module("properdocs.replacement")  # before any plugin imports mkdocs, which is then ProperDocs
pytest.importorskip("mkdocstrings")

from markdown import markdown  # noqa: E402
from properdocs.commands.build import build  # noqa: E402
from properdocs.config import load_config  # noqa: E402
from properdocs.exceptions import Abort  # noqa: E402


class Elements(HTMLParser):
    """What a page of the site refers to, and what in it can be referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        if tag in ("img", "script", "link", "iframe", "source") and (
            place := found.get("src") or found.get("href")
        ):
            self.loaded.append(place)


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> dict[Path, Elements]:
    """The pages of the site, strictly built into a folder.

    Raises:
        Abort: a link, an anchor or a reference that leads nowhere, or a page that the navigation leaves out.
    """
    monkeypatch.chdir(ROOT)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True, **changes)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return {path: Elements(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield built(tmp_path_factory.mktemp("site"), patch)


def dead(site: dict[Path, Elements]) -> list[str]:
    """Links and loaded files of built pages that are not there."""
    found = []
    for path, page in site.items():
        for place in [*page.links, *page.loaded]:
            if re.match(r"\w+:", place) or path.name == "404.html":
                continue
            target, _, anchor = place.partition("#")
            file = (path.parent / target).resolve() if target else path
            if not file.exists() or (anchor and file in site and anchor not in site[file].ids):
                found.append(f"{path.name}: {place}")
    return found


def fetched(site: dict[Path, Elements]) -> list[str]:
    """What a browser would fetch from elsewhere to show a page."""
    return [f"{p.name}: {x}" for p, page in site.items() for x in page.loaded if re.match(r"(\w+:)?//", x)]


def test_built_pages_lead_somewhere(site):
    assert len(site) > 25
    assert dead(site) == []


def test_pages_need_no_network(site):
    assert fetched(site) == []
    for path in site:
        assert "fonts.googleapis" not in path.read_text(encoding="utf-8")


def test_every_public_name_has_its_place(site):
    ids = {anchor for page in site.values() for anchor in page.ids}
    for room in (conadv_lab, sharpness, staleness):
        for name, home in room._HOMES.items():
            module = home if home.startswith("conadv_lab.") else f"{room.__name__}.{home}"
            assert f"{module}.{'load' if name == 'load_cluster' else name}" in ids


def test_formulas_examples_and_notebooks_are_as_meant(site):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in site}
    assert "x̂<sub>i</sub>" in pages["theory"]
    assert "x<sup>*</sup>" in pages["theory"]
    assert "θ<sub>t+1</sub> = θ<sub>t</sub> − η g<sub>t</sub>" in pages["theory"]
    assert re.findall(r"_\{|[θτ]_", pages["theory"]) == []
    assert "<blockquote" not in pages["methods"]
    assert "01_first_run_1.png" in pages["01_first_run"]


def test_formulas_leave_words_links_code_and_emphasis_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    formulas = import_module("formulas")
    text = "conadv_lab `θ_t` [a](x_t.md) *b* **c** B * C, x*_i and *x̂_t*\n\n    a_t = 1\n\nor\n\n    θ_{t−τ} ‖x*‖\n"
    made = markdown(text, extensions=[formulas.Formulas()])
    assert "conadv_lab <code>θ_t</code>" in made
    assert '<a href="x_t.md">a</a> <em>b</em> <strong>c</strong> B * C,' in made
    assert "x<sup>*</sup><sub>i</sub></span> and <em><span>x̂<sub>t</sub></span></em>" in made
    assert "a_t = 1" in made
    assert "θ<sub>t−τ</sub> ‖x<sup>*</sup>‖" in made


def small_site(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, Elements]:
    """A site of one page with this text, built as the whole one is."""
    (folder / "docs").mkdir()
    (folder / "docs/page.md").write_text(f"# Page\n\n## There\n\n{text}\n")
    return built(folder / "site", monkeypatch, docs_dir=str(folder / "docs"), nav=["page.md"], hooks=[])


def test_a_small_site_builds(tmp_path, monkeypatch):
    text = "[a](#there) [`LARS`][conadv_lab.optim.lars.LARS]\n\n::: conadv_lab.optim.lars"
    assert small_site(text, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "[a](gone.md)",
        "[a](page.md#not-there)",
        "[`Gone`][conadv_lab.Gone]",
        "::: conadv_lab.gone",
        "![a](gone.png)",
    ],
)
def test_what_leads_nowhere_fails_the_build(text, tmp_path, monkeypatch):
    with pytest.raises(Abort, match=r"1 warning|BuildError"):
        small_site(text, tmp_path, monkeypatch)


def test_a_file_of_the_repository_that_is_gone_fails_the_build(tmp_path, monkeypatch, caplog):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(
        "[a](../analysis/results/cost.csv) [b](../analysis/results/costs.csv)"
    )
    with pytest.raises(Abort):
        built(tmp_path / "bad", monkeypatch, docs_dir=str(tmp_path / "docs"), nav=["page.md"])
    assert "costs.csv" in caplog.text
    assert "cost.csv" not in caplog.text


def test_a_page_outside_the_navigation_fails_the_build(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("page", "lost"):
        (tmp_path / f"docs/{name}.md").write_text("# Page\n")
    with pytest.raises(Abort):
        built(tmp_path / "bad", monkeypatch, docs_dir=str(tmp_path / "docs"), nav=["page.md"], hooks=[])


def test_dead_ends_of_built_pages_are_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<script src='https://x.org/a.js'></script><a href='gone.html'>a</a><p id='b'><a href='#c'>c</a>"
    )
    site = {page: Elements(page.read_text())}
    assert dead(site) == ["page.html: gone.html", "page.html: #c"]
    assert fetched(site) == ["page.html: https://x.org/a.js"]
