"""The real loggers, which write into folders alone, have what a run's folder has, after a resume too."""

import pytest

from conadv_lab.training.loop import train
from tests.training.test_loop import tiny, train_killed_before

CONFIG = tiny(method="conadv", steps=6, checkpoint_every=2)


def test_tensorboard_has_each_step_once_after_a_resume(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra [adapters] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = CONFIG.replace(log_to="tensorboard", log_every=1)
    train_killed_before(5, config, tmp_path / "run", monkeypatch)
    folder = train(config, tmp_path / "run", resume=True, progress="none")
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    wanted = {line["step"]: line["loss"] for line in folder.metrics()}
    assert logged == pytest.approx(wanted)
    assert len(events.Scalars("loss")) == 6
    assert events.Scalars("final_test_accuracy")


def test_wandb_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="the extra [adapters] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder = train(CONFIG.replace(log_to="wandb"), tmp_path / "run", progress="none")
    (file,) = folder.path.rglob("run-*.wandb")
    content = file.read_bytes()
    assert b"adversarial_loss" in content
    assert b"final_test_accuracy" in content


def test_mlflow_in_a_folder(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra [adapters] is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = CONFIG.replace(log_to="mlflow")
    train_killed_before(5, config, tmp_path / "run", monkeypatch)
    folder = train(config, tmp_path / "run", resume=True, progress="none")
    run = (folder.path / "mlflow_run.txt").read_text().strip()
    client = mlflow.MlflowClient()
    assert client.get_run(run).info.status == "FINISHED"
    history = {one.step: one.value for one in client.get_metric_history(run, "loss")}
    assert history == {line["step"]: line["loss"] for line in folder.metrics()}
    assert client.get_run(run).data.params["method.method"] == "conadv"
