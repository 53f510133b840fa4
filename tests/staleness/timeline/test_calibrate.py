"""Constants fitted to runs: what is found, and what is refused."""

import pytest

from conadv_lab.config import Config
from conadv_lab.runs import RunFolder
from conadv_lab.staleness.__main__ import main
from conadv_lab.staleness.timeline import calibrate
from conadv_lab.staleness.timeline.cluster import Compute, load
from conadv_lab.staleness.timeline.step_times import step_times
from conadv_lab.staleness.timeline.workload import workload_of


def run_folder(path, method, batch, milliseconds, ranks=1, **fields):
    """A finished run's config, manifest and metrics, as the loop writes them."""
    config = Config().replace(
        method=method, global_batch=batch, model="digits-cnn", dataset="digits", **fields
    )
    folder = RunFolder(path)
    folder.create(config, {"ranks": ranks})
    clean = batch // 2 if method.endswith("-equal") else batch
    for step, noise in enumerate((9.0, 1.0, 1.02, 0.98, 1.0)):  # the first line holds the start
        folder.append_metrics({"step": step, "images_per_second": 1e3 * clean / (milliseconds * noise)})
    return path


def test_calibration_finds_the_constants_that_made_the_runs(tmp_path):
    machine = load("this-machine")
    truth = machine.replace()
    object.__setattr__(truth, "compute", {"digits-cnn": Compute(2.5, 0.08)})
    runs = []
    for method, batch, place in (
        ("vanilla", 32, "serial"), ("disadv", 64, "serial"), ("conadv", 128, "serial"), ("conadv", 24, "stream"),
        ("recycled-equal", 256, "serial"),
    ):  # fmt: skip
        workload = workload_of(Config().replace(method=method, global_batch=batch, model="digits-cnn"))
        seconds = step_times(truth, workload, method, 1, placement=place).compute
        run = tmp_path / f"{method}{batch}"
        runs.append(run_folder(run, method, batch, 1e3 * seconds, placement=place))
    found, lines = calibrate.from_runs(machine, runs)
    assert found.of("digits-cnn").fixed_ms == pytest.approx(2.5, rel=1e-6)
    assert found.of("digits-cnn").image_ms == pytest.approx(0.08, rel=1e-6)
    assert [line["ratio"] for line in lines] == pytest.approx([1.0] * 5)


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
    several = run_folder(tmp_path / "several", "vanilla", 32, 5.0, ranks=2)
    with pytest.raises(ValueError, match="several ran on 2 ranks; allowed: runs on one device"):
        calibrate.from_runs(load("this-machine"), [several])
    other = RunFolder(tmp_path / "other")
    other.create(Config().replace(model="resnet18"), {})
    other.append_metrics({"images_per_second": 10.0})
    with pytest.raises(
        ValueError, match="the runs have models digits-cnn, resnet18; allowed: runs of one model"
    ):
        calibrate.from_runs(load("this-machine"), [one, tmp_path / "other"])
