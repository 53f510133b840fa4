"""What cannot be captured runs operator by operator after one sentence, with graphs that CUDA would break off."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import conadv_lab as cl
from conadv_lab.capture.replays import Backend, CudaGraphs
from conadv_lab.capture.step import CapturedStep
from conadv_lab.methods.base import Method, Vanilla
from conadv_lab.methods.lanes import Beside, Lanes, Streams
from tests.capture.recording import Recordings
from tests.capture.test_step import CPU, CRITERION, batches, small_net


class Net(nn.Module):
    """A network that reads a value back, or recomputes a part of its forward in the backward."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.network, self.fault = small_net(), fault

    def forward(self, x):
        if self.fault == "reentrant":
            first, *others = self.network
            return checkpoint(nn.Sequential(*others), first(x), use_reentrant=True)
        return self.network(x) * (2.0 if self.fault == "read" and x.mean().item() < 9 else 1.0)


class AsCudaRefuses(TorchDispatchMode):
    """Operators within fail as they do while a stream is captured: a read-back breaks the capture off."""

    broken = False

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
        if operator is torch.ops.aten._local_scalar_dense.default:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def cuda(monkeypatch):
    """Enough of torch.cuda for `CudaGraphs` and `Streams` on a CPU; in a broken capture no stream can be waited for."""
    captures: list[AsCudaRefuses] = []

    class Stream:
        device, device_index = CPU, 0

        def __init__(self, *_):
            pass

        def wait_stream(self, _other):
            if captures and captures[-1].broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    @contextmanager
    def graph(*_, **__):
        captures.append(AsCudaRefuses())
        try:
            with captures[-1]:
                yield
        finally:
            if captures.pop().broken:
                raise RuntimeError("CUDA error: the capture was invalidated")

    @contextmanager
    def stream(_one):
        yield

    for name, value in {
        "Stream": Stream, "stream": stream, "graph": graph, "current_stream": Stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "graph_pool_handle": lambda: (0, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    monkeypatch.setattr("conadv_lab.methods.lanes.require_streams", lambda _: None)


def weights(
    fault: str, method: Method, backend: Backend | None, *, required: bool = False
) -> list[torch.Tensor]:
    model = cl.mixture_batch_norm(Net(fault))
    updates = cl.LARS(model.parameters(), 0.5)
    step = CapturedStep(model, method, updates, CRITERION, batches(1)[0])
    step._begin(model, method, updates, CRITERION, CPU, backend, required)
    for batch in batches(12):
        step(*batch)
    return list(model.parameters())


def assert_same_as_plain(found: list[torch.Tensor], fault: str, method: Method) -> None:
    plain = weights(fault, method, None)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def conadv(lanes: Lanes) -> Method:
    method = cl.ConAdv(cl.SignAttack(epsilon=0.1))
    method.lanes = lanes
    return method


def test_a_value_that_a_forward_reads_back(cuda, capsys):
    found = weights("read", conadv(Streams(CPU)), CudaGraphs(CPU))
    assert capsys.readouterr().err == (
        "steps are not captured: the model, the loss or the method does what a graph cannot hold, such as .item() "
        "(CUDA error: operation not permitted when stream is capturing)\n"
    )
    assert_same_as_plain(found, "read", conadv(Lanes()))


def test_reentrant_checkpointing(capsys):
    """It needs ``.backward()``, which passes beside one another do not make."""
    method = Vanilla()
    method.lanes = Beside()
    found = weights("reentrant", method, Recordings())
    assert capsys.readouterr().err == (
        "steps are not captured: the model's checkpointing is reentrant; give torch.utils.checkpoint "
        "use_reentrant=False\n"
    )
    assert_same_as_plain(found, "reentrant", Vanilla())
    method.lanes = Beside()
    with pytest.raises(
        ValueError, match=r"capture is 'on', but the model's checkpointing is reentrant; .*'off'"
    ):
        weights("reentrant", method, Recordings(), required=True)
