"""The command, calibration from runs, and the page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import conadv_lab.staleness as st
from conadv_lab.config import Config
from conadv_lab.runs import RunFolder
from conadv_lab.staleness import calibrate, report
from conadv_lab.staleness.__main__ import main
from conadv_lab.staleness.cluster import Compute, load
from conadv_lab.staleness.plan import plan
from conadv_lab.staleness.workload import WORKLOADS, workload_of


def test_rows_of_the_table_as_json_and_csv(tmp_path, capsys):
    out = {kind: tmp_path / f"rows.{kind}" for kind in ("json", "csv")}
    words = [
        "timeline",
        "--devices",
        "8",
        "64",
        "--method",
        "disadv",
        "conadv",
        "--placement",
        "serial",
        "stream",
    ]
    assert main([*words, "--json", str(out["json"]), "--csv", str(out["csv"])]) == 0
    rows = json.loads(out["json"].read_text())["rows"]
    frame = st.simulate(
        "h100", "imagenet-resnet50-32k", ["disadv", "conadv"], devices=[8, 64], placement=["serial", "stream"]
    )
    assert rows == json.loads(json.dumps(frame.to_dict("records")))
    assert len(pd.read_csv(out["csv"])) == len(rows) == 6
    printed = capsys.readouterr().out
    assert "predicted by a model, not measured" in printed
    assert "device-hours" in printed


def test_a_line_that_begins_with_an_option_is_one_of_timeline(tmp_path):
    saved = tmp_path / "mine.toml"
    words = [
        "--set",
        "stragglers.spread=0.3",
        "network.algorithm=ring",
        "--save",
        str(saved),
        "--method",
        "vanilla",
    ]
    assert main(words) == 0
    assert load(str(saved)).stragglers.spread == 0.3
    assert load(str(saved)).network.algorithm == "ring"
    assert main(["--cluster", str(saved), "--best", "--devices", "8"]) == 0


@pytest.mark.parametrize("kind", ["npy", "csv"])
def test_the_trace_of_effective_staleness(tmp_path, kind):
    file = tmp_path / f"trace.{kind}"
    words = [
        "--method",
        "conadv",
        "--devices",
        "64",
        "--placement",
        "ranks",
        "--attackers",
        "0.2",
        "--staleness",
        "4",
    ]
    assert main([*words, "--steps", "50", "--trace", str(file)]) == 0
    done = st.one_timeline(
        "h100",
        "imagenet-resnet50-32k",
        "conadv",
        devices=64,
        placement="ranks",
        attackers=13,
        staleness=4,
        steps=50,
    )
    if kind == "npy":
        found = np.load(file, allow_pickle=False)
    else:
        table = pd.read_csv(file)
        assert table["step"].tolist() == list(range(50))
        found = table.drop(columns="step").to_numpy()
    assert found.shape == (50, 51)
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, done.trace)


def test_the_fit_is_shown(capsys, tmp_path):
    assert main(["fit", "--csv", str(tmp_path / "fit.csv")]) == 0
    printed = capsys.readouterr().out
    assert "h100: a pass takes 2.761 ms + 0.1344 ms an image; within ±10%" in printed
    assert "False" not in printed
    assert len(pd.read_csv(tmp_path / "fit.csv")) == 11
    assert calibrate.every_choice("a100") == (1, 6)
    assert main(["clusters"]) == 0
    assert "tpu-like" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["timelin"], "unknown verb 'timelin'; allowed: .* Did you mean 'timeline'?"),
        (["timeline", "--devices", "0"], "devices is 0; allowed: a whole number of at least 1"),
        (["timeline", "--set", "network.network_hop_us=-1"], "network.network_hop_us is -1; allowed"),
        (["timeline", "--set", "network.card_gbs=fast"], "card_gbs in [network] is 'fast'; allowed: a number"),
        (["timeline", "--set", "card_gbs"], "--set is 'card_gbs'; allowed: SECTION.KEY=VALUE"),
        (["timeline", "--method", "conadv", "--placement", "ranks", "--devices", "8", "--attackers", "8"],
         "attackers is 8; allowed: 1 to 7"),
        (["timeline", "--method", "conadv", "--placement", "ranks", "--attackers", "many"], "attackers are 'many'"),
        (["timeline", "--cluster", "h10"], "unknown cluster 'h10'; allowed: a100, h100"),
        (["timeline", "--cluster", "none.toml"], "cluster 'none.toml' does not exist"),
        (["timeline", "--recipe", "digts-conadv"], "unknown recipe 'digts-conadv'"),
        (["timeline", "--trace", "trace.npy"], "--trace needs one row"),
        (["timeline", "--json", "no/such/folder/x.json"], "cannot be written"),
        (["timeline", "--calibrate", "nowhere"], "nowhere is no run folder"),
        (["report", "--html", "x.html", "--dynamics", "none.csv"], "none.csv is no table"),
        (["report", "--html", "x.html", "--devices", "1"], "devices is 1; allowed: a whole number of at least 2"),
        (["clusters", "h100"], "clusters takes no options"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.strip().splitlines()) == 1
    if message.startswith("unknown verb"):
        assert "Did you mean 'timeline'?" in told
    else:
        assert message in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["--help"], ["timeline", "--help"], ["fit", "--help"], ["timeline", "--devices", "8"]]
)
def test_starts_without_torch(words):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "conadv_lab.staleness", *words],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "|" in line}
    assert "conadv_lab.staleness" in imported
    assert "torch" not in imported


def run_folder(path, method, batch, milliseconds, **fields):
    """A finished run's config and metrics, as the loop writes them."""
    config = Config().replace(
        method=method, global_batch=batch, model="digits-cnn", dataset="digits", **fields
    )
    folder = RunFolder(path)
    folder.create(config, {})
    clean = batch // 2 if method.endswith("-equal") else batch
    for step, noise in enumerate((9.0, 1.0, 1.02, 0.98, 1.0)):  # the first line holds the start
        folder.append_metrics({"step": step, "images_per_second": 1e3 * clean / (milliseconds * noise)})
    return path


def test_calibration_finds_the_constants_that_made_the_runs(tmp_path):
    machine = load("this-machine")
    truth = machine.replace()
    object.__setattr__(truth, "compute", {"digits-cnn": Compute(2.5, 0.08)})
    runs = []
    for method, batch in (("vanilla", 32), ("disadv", 64), ("conadv", 128), ("recycled-equal", 256)):
        workload = workload_of(Config().replace(method=method, global_batch=batch, model="digits-cnn"))
        seconds = plan(truth, workload, method, 1).compute
        runs.append(run_folder(tmp_path / f"{method}{batch}", method, batch, 1e3 * seconds))
    found, lines = calibrate.from_runs(machine, runs)
    assert found.of("digits-cnn").fixed_ms == pytest.approx(2.5, rel=1e-6)
    assert found.of("digits-cnn").image_ms == pytest.approx(0.08, rel=1e-6)
    assert [line["ratio"] for line in lines] == pytest.approx([1.0] * 4)


def test_calibration_from_one_run_scales_the_known_constants(tmp_path, capsys):
    run = run_folder(tmp_path / "one", "vanilla", 100, 34.0)
    machine = load("this-machine")
    before = machine.of("digits-cnn")
    found, _ = calibrate.from_runs(machine, [run])
    after = found.of("digits-cnn")
    assert after.fixed_ms + 100 * after.image_ms == pytest.approx(34.0)
    assert after.fixed_ms / after.image_ms == pytest.approx(before.fixed_ms / before.image_ms)
    assert main(["--calibrate", str(run), "--method", "vanilla", "--save", str(tmp_path / "mine.toml")]) == 0
    printed = capsys.readouterr().out
    assert "digits-cnn: a pass takes" in printed
    assert load(str(tmp_path / "mine.toml")).of("digits-cnn").image_ms == pytest.approx(after.image_ms)


def test_calibration_refuses_what_it_cannot_use(tmp_path):
    one = run_folder(tmp_path / "one", "vanilla", 32, 5.0)
    empty = RunFolder(tmp_path / "empty")
    empty.create(Config(), {})
    with pytest.raises(ValueError, match="has logged no images_per_second"):
        calibrate.from_runs(load("this-machine"), [tmp_path / "empty"])
    other = RunFolder(tmp_path / "other")
    other.create(Config().replace(model="resnet18"), {})
    other.append_metrics({"images_per_second": 10.0})
    with pytest.raises(ValueError, match="the runs are of digits-cnn, resnet18; allowed: runs of one model"):
        calibrate.from_runs(load("this-machine"), [one, tmp_path / "other"])


@pytest.fixture(scope="module")
def page():
    rows = [
        {"draw": "constant", "tau": tau, "phase": phase, "measure": measure, "value": 1.0 + tau}
        for tau in (0, 1, 4)
        for measure, phase in (
            ("test_accuracy", "whole"),
            ("top_eigenvalue", "whole"),
            ("sign_agreement", "late"),
        )
    ]
    return report.build("h100", WORKLOADS["imagenet-resnet50-4k"], devices=16, dynamics=pd.DataFrame(rows))


def test_the_page_holds_everything_and_needs_nothing(page):
    names = [picture.name for picture in page.pictures]
    assert names == ["gantt", "images", "devices", "tau", "fit", "dynamics", "probes"]
    assert page.html.count("<svg") == len(names)
    assert "predicted by a model" in page.html
    assert "http://" not in page.html.replace("http://www.w3.org", "").replace("http://creativecommons", "")
    assert "src=" not in page.html
    assert "held out" in page.html
    assert "+12.3 %" in page.html  # the largest residual is not hidden


def test_the_page_gives_the_simple_models_numbers_from_its_assumptions():
    for row in report._simple(load("h100"), WORKLOADS["imagenet-resnet50-32k"]):
        quoted, same, *_ = row["cells"][:4]
        assert same == pytest.approx(quoted, abs=0.006)
        quoted, same, joint, apart = row["cells"][4:]
        assert same == pytest.approx(quoted, abs=0.006)
        assert apart <= joint + 0.01


def test_rows_behind_the_page(page):
    assert set(page.rows["table"]) == {"images per device", "devices"}
    assert set(page.rows["line"]) == {
        "vanilla",
        "disadv",
        "stream",
        "ranks",
        "spare",
        "recycled",
        "recycled-equal",
    }
    assert page.rows["devices"].max() == 8192  # a spare device for each of 4,096
    wide = page.rows[page.rows["table"] == "devices"].pivot_table("step_ms", "workers", "line")
    assert (wide["stream"] < wide["disadv"]).all()
    assert (wide["vanilla"] < wide["recycled"]).all()


def test_the_chart_of_steps_shows_every_pass():
    done = st.one_timeline(
        "h100",
        WORKLOADS["imagenet-resnet50-1k"],
        "conadv",
        devices=6,
        placement="ranks",
        attackers=2,
        steps=4,
    )
    spans = pd.DataFrame(done.spans(3))
    assert len(spans) == 3 * (4 * 2 + 2)
    assert (spans["end"] > spans["start"]).all()
    ends = spans.groupby("step")["end"].max()
    assert (ends.to_numpy() <= done.ends[:3] + 1e-12).sum() >= 2  # an attacker may run on into the next step
    trainers = spans[spans["role"] == "trainer"]
    for step in range(3):
        own = trainers[trainers["step"] == step]
        assert own["end"].max() <= done.ends[step]
        assert own["start"].min() >= (done.ends[step - 1] if step else 0)


def test_tables_of_the_dynamics_are_read_or_refused(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [{"tau": 1, "measure": "test_accuracy", "value": 2.0}]}))
    assert report.read_rows(file)["value"].tolist() == [2.0]
    file.write_text(json.dumps({"rows": [{"tau": 1}]}))
    with pytest.raises(ValueError, match="lacks the columns measure, value"):
        report.read_rows(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no table of the dynamics"):
        report.read_rows(file)
