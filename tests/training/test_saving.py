"""Saving beside the training: what is saved is the state of that moment, and no failure passes unseen."""

import errno
import threading
import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conadv_lab.runs import RunFolder
from conadv_lab.training.saving import Room, Saver


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
    made, arrived = Room().copied(state)
    arrived()
    made["model"]["weight"].add_(1)
    made["list"][0].add_(1)
    assert state["model"]["weight"].tolist() == [1, 1]
    assert state["list"][0].item() == 0
    assert made["list"][1] == (3, None)
    assert made["model"]._metadata == state["model"]._metadata


def mixed() -> dict:
    """Tensors of many types, shapes and layouts."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 4, 5, generator=draw)
    return {
        "last": images.to(memory_format=torch.channels_last),
        "expanded": images[:, :1].expand(2, 3, 4, 5),
        "odd": [torch.arange(5, dtype=torch.uint8), torch.tensor(3), torch.tensor([True]), torch.empty(0, 2)],
        "half": images.bfloat16().requires_grad_(),
    }


def test_copies_lie_in_one_buffer_that_is_kept_and_are_saved_as_ever(folder):
    state, room = mixed(), Room()
    with Copied() as copies:
        made, _ = room.copied(state)
    assert copies.blocking == 0, "each copy makes the host wait for the device"
    flat = [made["last"], made["expanded"], made["half"], *made["odd"][:3]]
    places = [tensor.data_ptr() for tensor in flat]
    assert max(places) - min(places) < 2000
    assert room.copied(state)[0]["last"].data_ptr() == places[0]
    folder.save_checkpoint(1, made)
    _, loaded = folder.load_checkpoint()
    for name in ("last", "expanded", "half"):
        assert torch.equal(loaded[name], state[name])
    assert all(map(torch.equal, loaded["odd"], state["odd"]))
    assert loaded["last"].is_contiguous(memory_format=torch.channels_last)
    assert loaded["last"].untyped_storage().nbytes() == 2 * 3 * 4 * 5 * 4, (
        "no storage is saved but a tensor's own"
    )
    assert not made["half"].requires_grad


class Copied(TorchDispatchMode):
    """Counts copies that a device would be waited for."""

    blocking = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket
        asynchronous = args[2:3] == (True,) or (kwargs or {}).get("non_blocking")
        self.blocking += name in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and not asynchronous
        return func(*args, **(kwargs or {}))


def test_writing_takes_no_second_copy_in_memory(folder):
    tracemalloc.start()
    try:
        folder.save_checkpoint(1, {"weights": torch.zeros(2_000_000)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


def test_what_completes_a_state_is_awaited_by_the_thread_alone(folder, gate):
    names = []

    def completed(state):
        names.append(threading.current_thread().name)
        return state | {"others": 2}

    with Saver(folder) as saver:
        saver.save(1, {"own": 1}, completed)
        gate.set()
    assert names == ["saving_0"]
    assert folder.load_checkpoint()[1] == {"own": 1, "others": 2}


@pytest.mark.gpu
def test_on_a_gpu_the_host_goes_on_and_the_state_of_that_moment_is_copied():
    weight = torch.ones(1 << 20, device="cuda")
    room = Room()
    made, arrived = room.copied({"weight": weight, "step": torch.tensor(1.0)})
    weight.mul_(2)
    arrived()
    assert made["weight"].device.type == "cpu"
    assert torch.equal(made["weight"], torch.ones(1 << 20))
