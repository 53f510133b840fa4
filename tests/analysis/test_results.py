"""The committed tables bear what is said of them, and the documents say what the tables hold."""

import json
import re
from pathlib import Path

import pytest

from analysis import texts
from analysis.arms import LEARNING_RATES, SCALES, best_rates, cells
from analysis.study import FIGURES, RESULTS, studies, table

STUDIES = studies()
ROOT = Path(__file__).parents[2]
TABLES = [*STUDIES, LEARNING_RATES]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_small_and_say_where_they_come_from(name):
    assert (RESULTS / f"{name}.csv").stat().st_size < 100_000
    manifest = json.loads((RESULTS / f"{name}.json").read_text())
    scale = STUDIES[name].committed if name in STUDIES else "full"
    assert manifest["command"].startswith(f"python -m analysis.{name} --scale {scale}")
    assert manifest["rows"] == len(table(name))
    assert manifest["machine"]["cpu"]
    for commit in manifest["commit"].split(", "):  # runs may have been made at more than one
        assert re.fullmatch(r"[0-9a-f]{40}\+?", commit)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", manifest["date"])


@pytest.mark.parametrize("name", STUDIES)
def test_the_conclusion_has_three_sentences_that_the_table_bears(name):
    own, rows = STUDIES[name], table(name)
    numbers = own.numbers(rows)
    assert own.unsupported(numbers) == []
    assert own.claims
    told = own.told(rows)
    assert len(re.findall(r"[.!?](?=\s+[A-Z]|$)", told)) == 3, told
    assert not re.search(r"\d\.\d", own.conclusion.replace("ε = 0.1", "")), (
        "a figure that is not read from the table"
    )


@pytest.mark.parametrize("name", STUDIES)
def test_the_figure_is_redrawn_from_the_table_alone(name, tmp_path):
    path = STUDIES[name].picture(table(name), tmp_path)
    assert path.stat().st_size > 10_000
    assert 10_000 < (FIGURES / f"{name}.png").stat().st_size < 150_000


def test_documents_are_in_step_with_the_tables():
    assert texts.main(["--check"]) == 0


def test_a_stale_number_is_found(tmp_path, monkeypatch):
    document = tmp_path / "page.md"
    monkeypatch.setattr(texts, "DOCUMENTS", (str(document),))
    document.write_text("<!-- study accuracy_vs_batch:conadv_vanilla -->+9.99<!-- end -->")
    assert texts.main(["--check"]) == 1
    assert texts.main([]) == 0
    found = STUDIES["accuracy_vs_batch"].numbers(table("accuracy_vs_batch"))["conadv_vanilla"]
    assert str(found) in document.read_text()
    assert texts.main(["--check"]) == 0


def test_an_unknown_number_is_told_with_the_nearest_right_one():
    with pytest.raises(ValueError, match="conadv_vanilla"):
        texts.refreshed(
            "<!-- study a:conadv_vanila -->1<!-- end -->", lambda study: {"conadv_vanilla": 1, "table": ""}
        )


@pytest.mark.parametrize("document", ["docs/results.md", "docs/index.md", "docs/method.md", "docs/faq.md"])
def test_no_measured_figure_stands_outside_the_marks(document):
    text = texts.MARKED.sub("", Path(document).read_text())
    quoted = r"ε = 0\.1|the paper's abstract reports 75\.3 %"
    assert re.findall(r"\d\.\d", re.sub(quoted, "", text)) == []


@pytest.mark.parametrize("document", texts.DOCUMENTS)
def test_a_mark_within_a_paragraph_does_not_begin_a_line(document):
    """A comment at the beginning of a line ends the paragraph before it, in every Markdown."""
    assert re.findall(r"^<!-- study \w+:\w+ -->.+", Path(document).read_text(), re.MULTILINE) == []


def test_the_readmes_answer_takes_its_figures_from_the_studies():
    answer = re.search(r"## Does it help\?\n\n(.*?)\n\n\*\*", Path("README.md").read_text(), re.DOTALL).group(
        1
    )
    studies_told = [study for _, study, *_ in texts.MARKED.findall(answer)]
    twice = ("regimes", "regime_attempts", "accuracy_vs_batch")
    assert studies_told == [name for name in twice for _ in range(2)] + ["neighbours", "cifar_subset"]
    assert re.findall(r"\d\.\d", texts.MARKED.sub("", answer)) == []


def test_the_grid_of_learning_rates_is_whole_where_it_is_there():
    grid, scale = table(LEARNING_RATES), SCALES["full"]
    planned = {(c.arm, c.method, c.global_batch, c.steps) for c in cells(scale)}
    lines = grid.groupby(["arm", "method", "global_batch", "steps"])["lr"].apply(tuple)
    assert set(lines.index) <= planned
    assert set(lines) == {scale.rates}
    assert set(grid["folds"]) == {len(scale.tuning_seeds)}


def test_reported_runs_are_at_their_tuned_rates():
    best = {(c.arm, c.method, c.global_batch): lr for c, lr in best_rates(table(LEARNING_RATES)).items()}
    rows = table("accuracy_vs_batch")
    for row in rows.to_dict("records"):
        assert row["lr"] == best[row["arm"], row["method"], row["global_batch"]]
    counted = rows.groupby(["arm", "method", "global_batch"])["seed"]
    assert (counted.nunique() == counted.size()).all()


def test_reported_runs_of_the_map_have_the_settings_that_tuning_chose():
    log, rows, place = (
        table("regimes_tuning"),
        table("regimes"),
        ["method", "global_batch", "epochs", "equal"],
    )
    chosen = log[log["chosen"]].groupby(place)[["lr", "weight_decay", "epsilon"]].agg(set)
    assert not rows.empty
    for row in rows.to_dict("records"):
        for name, found in chosen.loc[tuple(row[key] for key in place)].items():
            assert found == {row[name]}


def test_ten_seeds_at_the_largest_batch():
    rows = table("accuracy_vs_batch")
    for arm, methods in (("equal-epochs", 6), ("equal-steps", 4), ("equal-arithmetic", 1)):
        own = rows[(rows["arm"] == arm) & (rows["global_batch"] == 898)]
        assert own.groupby("method")["seed"].nunique().tolist() == [10] * methods
    depth = rows[rows["arm"] == "equal-depth"].groupby(["method", "global_batch"])["seed"].nunique()
    assert set(depth) == {10}
