"""The command: tables, traces, mistakes, and what it imports."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import conadv_lab.staleness as st
from conadv_lab import recipes
from conadv_lab.staleness.__main__ import main
from conadv_lab.staleness.timeline import calibrate
from conadv_lab.staleness.timeline.cluster import load
from conadv_lab.staleness.timeline.workload import WORKLOADS


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
    assert len(pd.read_csv(out["csv"])) == len(rows) == 8
    printed = capsys.readouterr().out
    assert "predicted by a model, not measured" in printed
    assert "device-hours" in printed


def test_a_line_that_begins_with_an_option_is_one_of_timeline(tmp_path, capsys):
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
    capsys.readouterr()
    assert main(["--cluster", str(saved), "--best", "--devices", "8"]) == 0
    methods = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert set(methods) == {"vanilla", "disadv", "conadv"}


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


def test_the_trace_of_a_timeline_is_trained_with(tmp_path):
    file = tmp_path / "tau.csv"
    assert main(
        ["--cluster", "this-machine", "--recipe", "digits-conadv", "--global-batch", "48", "--method", "conadv",
         "--devices", "6", "--placement", "ranks", "--attackers", "2", "--staleness", "4",
         "--set", "stragglers.spread=0.3", "--steps", "20", "--trace", str(file)]
    ) == 0  # fmt: skip
    taus = st.read_trace(file)
    config = recipes.digits.conadv().replace(global_batch=48, train_images=150, steps=14, probe_every=13)
    frame = st.study(config, [st.Draw("trace", trace=taus)], curvature_images=0)
    probed = frame[(frame["step"] == 13) & (frame["measure"] == "distance")].sort_values("worker")
    assert probed["effective_tau"].tolist() == taus[13].tolist()
    assert (probed["value"] > 0).tolist() == (taus[13] > 0).tolist()
    assert len(np.unique(taus[:14])) > 2


def test_the_fit_is_shown(capsys, tmp_path):
    assert main(["fit", "--csv", str(tmp_path / "fit.csv")]) == 0
    printed = capsys.readouterr().out
    assert "h100: a pass takes 2.761 ms + 0.1344 ms per image; within ±10%" in printed
    assert "False" not in printed
    assert len(pd.read_csv(tmp_path / "fit.csv")) == 11 + 43  # of MLPerf, of one H200
    assert calibrate.every_choice("a100") == (1, 6)  # docs/staleness.md
    assert calibrate.every_choice("h100") == (13, 35)
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
        (["timeline", "--method", "conadv", "--placement", "ranks", "--attackers", "many"], "attackers is 'many'"),
        (["timeline", "--cluster", "h10"], "unknown cluster 'h10'; allowed: a100, h100"),
        (["timeline", "--cluster", "none.toml"], "cluster 'none.toml' does not exist"),
        (["timeline", "--recipe", "digts-conadv"], "unknown recipe 'digts-conadv'"),
        (["timeline", "--trace", "trace.npy"], "--trace needs one row"),
        (["timeline", "--json", "no/such/folder/x.json"], "cannot be written"),
        (["timeline", "--calibrate", "nowhere"], "nowhere is not a run folder"),
        (["report", "--html", "x.html", "--dynamics", "none.csv"], "none.csv is no file; allowed: the table"),
        (["report", "--html", "x.html", "--devices", "1"], "devices is 1; allowed: a whole number of at least 2"),
        (["report", "--html", "x.html", "--figures", __file__], "is a file; pass the path of a folder as --figures"),
        (["--best", "--method", "vanilla"], "method is 'vanilla'; allowed: conadv, advprop, asyncsam, fgsm-rs, sampa"),
        (["--best", "--method", "conadv", "asyncsam"], "method is 'conadv asyncsam'; allowed: one with --best"),
        (["--best", "--placement", "ranks"], "placement is 'ranks'; allowed with --best: none"),
        (["--best", "--attackers", "3"], "attackers is '3'; allowed with --best: none"),
        (["--set", "compute.resnet50.fixed_ms=3"], "allowed: any section but compute"),
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
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "|" in line}
    assert "conadv_lab.staleness" in imported
    assert "torch" not in imported


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
