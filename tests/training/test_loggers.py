"""Loggers get what the run folder has, stop no run when they fail, and a missing one is one sentence."""

import json

import pytest

from conadv_lab import extras
from conadv_lab.runs import RunFolder
from conadv_lab.training import loggers
from conadv_lab.training.loop import train
from tests.training.test_loop import tiny

CONFIG = tiny(method="conadv", steps=6, checkpoint_every=2)


class Kept:
    """Keeps what it is told."""

    def __init__(self, fails: bool = False) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.fails, self.asked, self.closed = fails, 0, False

    def log(self, step, figures):
        self.asked += 1
        if self.fails:
            raise ConnectionError("nobody answers\nmore")
        self.lines.append((step, dict(figures)))

    def close(self):
        self.closed = True


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(loggers, "require_installed", lambda name: None)
    logger = Kept()
    monkeypatch.setattr(loggers, "TensorBoard", lambda folder, step: logger)
    return logger


def test_a_logger_gets_the_lines_of_the_folder_and_the_result(kept, tmp_path):
    folder = train(CONFIG.replace(log_to="tensorboard"), tmp_path / "run", progress="none")
    lines = [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in folder.metrics()]
    assert kept.lines[:-1] == json.loads(json.dumps(lines)) or kept.lines[:-1] == lines
    step, final = kept.lines[-1]
    assert step == 5
    assert final["final_test_accuracy"] == folder.result()["test_accuracy"]
    assert all(isinstance(value, float) for value in final.values())
    assert kept.closed


def test_a_logger_that_fails_stops_no_run_and_is_told_of_once(kept, tmp_path):
    kept.fails = True
    with pytest.warns(
        UserWarning, match="logging to tensorboard failed .*ConnectionError: nobody answers"
    ) as told:
        folder = train(CONFIG.replace(log_to="tensorboard"), tmp_path / "run", progress="none")
    assert kept.asked == 1
    assert len([one for one in told if "logging to" in str(one.message)]) == 1
    plain = train(CONFIG, tmp_path / "plain", progress="none")
    assert folder.result()["parameters_sha256"] == plain.result()["parameters_sha256"]


def test_a_missing_package_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(
        extras, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name=name))
    )
    message = r"^log_to 'wandb' needs wandb, which is not installed: pip install 'conadv-lab\[adapters\]'$"
    with pytest.raises(ValueError, match=message):
        train(CONFIG.replace(log_to="wandb"), tmp_path / "run", progress="none")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_without_a_logger_leaves_no_other_file(tmp_path):
    folder = train(CONFIG, tmp_path / "run", progress="none")
    assert {p.name for p in RunFolder(folder.path).path.iterdir()} >= {"config.json", "metrics.jsonl"}
    assert not list(folder.path.glob("tensorboard"))
