"""Saving beside the training: what is saved is the state of that moment, and no failure passes unseen."""

import errno
import threading

import pytest
import torch

from conadv_lab.runs import RunFolder
from conadv_lab.training.saving import Saver, copied


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Checkpoints are written only once it is set."""
    opened, write = threading.Event(), RunFolder.save_checkpoint

    def waiting(*words):
        assert opened.wait(60)
        return write(*words)

    monkeypatch.setattr(RunFolder, "save_checkpoint", waiting)
    return opened


def test_training_goes_on_and_the_state_of_that_moment_is_saved(folder, gate):
    weight = torch.tensor([1.0])
    folder.append_metrics({"step": 0})
    size = folder.metrics_size()
    with Saver(folder) as saver:
        saver.save(1, {"weight": weight})
        weight += 1
        folder.append_metrics({"step": 1})
        saver.check()
        assert folder.committed() == []
        gate.set()
    commit, state = folder.load_checkpoint()
    assert state["weight"].item() == 1.0
    assert commit["metrics_bytes"] == size < folder.metrics_size()


def test_a_failure_is_raised_at_the_next_look(folder, monkeypatch):
    def full(*_words):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    for look in (lambda s: s.wait(), lambda s: s.save(2, {}), lambda s: (s._writing.exception(), s.check())):
        with Saver(folder) as saver:
            saver.save(1, {})
            with pytest.raises(OSError, match="no space"):
                look(saver)
    with pytest.raises(OSError, match="no space"), Saver(folder) as saver:
        saver.save(1, {})


def test_another_failure_is_not_hidden_and_the_checkpoint_is_finished(folder, gate):
    def interrupted():
        with Saver(folder) as saver:
            saver.save(1, {"step": 1})
            gate.set()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert folder.committed()[0].name == "step_00000001"


def test_a_copy_shares_no_tensor_and_keeps_a_modules_versions():
    model = torch.nn.BatchNorm1d(2)
    state = {"model": model.state_dict(), "list": [torch.zeros(1), (3, None)]}
    made = copied(state)
    made["model"]["weight"].add_(1)
    made["list"][0].add_(1)
    assert state["model"]["weight"].tolist() == [1, 1]
    assert state["list"][0].item() == 0
    assert made["list"][1] == (3, None)
    assert made["model"]._metadata == state["model"]._metadata
