"""The command, end to end, on a stranger's model and on a run of ours."""

import csv
import json

import pytest

from conadv_lab.sharpness.__main__ import main
from conadv_lab.sharpness.measures.results import FACTS


def test_a_strangers_model(stranger, tmp_path, capsys):
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "csv")}
    words = [stranger, "--cross-check", "--figures", str(tmp_path / "figures"), "--learning-rate", "0.1"]
    words += [f"--fact={fact}" for fact in ("split=train", "augmentation=none", "weight_decay_inside=False")]
    words += [
        "--also",
        "density,sam_worst,adaptive_worst,layer_traces,landscape_line,landscape_plane,lr_lambda_max",
    ]
    words += ["--set", "k=2"]
    for kind, path in out.items():
        words += [f"--{kind}", str(path)]
    assert main(words) == 0
    data = json.loads(out["json"].read_text())
    names = [m["name"] for m in data["measures"]]
    assert {"top_eigenvalue", "trace", "density", "sam_worst", "adaptive_worst", "lr_lambda_max"} <= set(
        names
    )
    by_name = {m["name"]: m for m in data["measures"]}
    assert by_name["lr_lambda_max"]["value"] == pytest.approx(0.1 * by_name["top_eigenvalue"]["value"])
    assert by_name["trace"]["conditions"]["split"] == "train"
    assert float(data["cross_check"][0]["rows"][0][2].split()[-1]) < 1e-5
    html = out["html"].read_text()
    assert html.count("<svg") == 8
    assert "PyHessian" in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://creativecommons", "")
    rows = list(csv.DictReader(out["csv"].open()))
    assert float(next(r for r in rows if r["measure"] == "trace")["value"]) == by_name["trace"]["value"]
    assert (
        len(list((tmp_path / "figures").glob("*.png")))
        == len(list((tmp_path / "figures").glob("*.pdf")))
        == 8
    )
    assert "top_eigenvalue" in capsys.readouterr().out


MISTAKES = {
    "--measures=trase": "Did you mean 'trace'",
    "--set=kk=3": "unknown setting 'kk'",
    "--set=k": "NAME=VALUE",
    "--fact=split": "--fact is 'split'",
    "--fact=augmentatoin=none": "Did you mean 'augmentation'",
    "--fact=label_smoothing=0.3": "fact label_smoothing is 0.3; allowed: 0.0, which",
    "--html=/nowhere/a.html": "/nowhere/a.html cannot be written; allowed: a file in an existing folder",
    "--figures=pyproject.toml": "pyproject.toml is a file; pass the path of a folder as --figures",
    "--fact=split=train": "lacks metadata that cannot be inferred: augmentation, learning_rate, weight_decay_inside",
    "--dtype=float16": "unknown dtype",
    "--bn=evl": "Did you mean 'eval'",
    "--split=trian": "'train' or 'test'",
}


@pytest.mark.parametrize("word", sorted(MISTAKES))
def test_mistakes_exit_2_and_write_nothing(stranger, tmp_path, word, capsys):
    out = tmp_path / "out.json"
    facts = [] if "fact" in word else [f"--fact={name}=unknown" for name in FACTS]
    assert main([stranger, "--json", str(out), word, *facts]) == 2
    assert MISTAKES[word] in capsys.readouterr().err
    assert not out.exists()


def test_batches_that_can_be_read_once_are_kept(stranger, capsys):
    assert main([stranger.replace(":subject", ":once"), "--measures", "top_eigenvalue"]) == 0
    assert main([stranger.replace(":subject", ":no_function"), "--measures", "trace"]) == 2
    assert "is 'int'; allowed: a function that takes no arguments" in capsys.readouterr().err


def test_a_line_to_another_solution(stranger, tmp_path):
    out = tmp_path / "out.json"
    words = [stranger, "--measures", "top_eigenvalue", "--line-to", stranger, "--json", str(out)]
    assert main(words + [f"--fact={name}=unknown" for name in FACTS]) == 0
    line = json.loads(out.read_text())["measures"][-1]
    assert line["name"] == "landscape_between"
    assert line["value"]["axes"][0][0] == -0.25
    assert line["value"]["losses"] == pytest.approx([line["conditions"]["loss_value"]] * 21, rel=1e-5)


def test_places_that_do_not_exist(stranger, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    assert main([stranger.replace("subject", "wrong")]) == 2
    assert main([stranger.replace("subject", "sbject")]) == 2
    assert main([]) == 2
    told = capsys.readouterr().err
    for part in (
        "not a run folder",
        "has no config.json",
        "returned int",
        "Did you mean 'subject'",
        "nothing to measure",
    ):
        assert part in told


def test_a_run_its_checkpoint_and_one_of_another_architecture(tmp_path, capsys):
    from conadv_lab.config import Config
    from conadv_lab.training.loop import train

    config = Config().replace(epochs=1.0, global_batch=128, device="cpu", threads=1)
    run = train(config, tmp_path / "run", progress="none").path
    out = tmp_path / "out.json"
    words = ["--measures", "top_eigenvalue", "--examples", "64", "--json", str(out)]
    assert main([str(run), *words]) == 0
    whole = json.loads(out.read_text())["measures"][0]
    assert whole["conditions"]["split"] == "train"
    assert whole["conditions"]["examples"] == 64
    assert "test_accuracy" in whole["conditions"]
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert main([str(checkpoint), *words]) == 0
    assert json.loads(out.read_text())["measures"][0]["value"] == whole["value"]
    file = run / "config.json"
    other = json.loads(file.read_text())
    assert other["model"]["model"] != "resnet20"
    other["model"]["model"] = "resnet20"
    file.write_text(json.dumps(other))
    assert main([str(checkpoint), *words]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
