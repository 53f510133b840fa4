"""A step that sends messages is captured in segments: what may lie within one, and what happens where one fails.

Over one rank of a world; `tests.capture.test_ranks` has two.
"""

import pytest
import torch
import torch.distributed as dist

from conadv_lab.capture.replays import CannotCapture, CudaGraphs, Replays
from conadv_lab.models import synchronised
from conadv_lab.models.norm import share_statistics
from conadv_lab.outside import is_captured, outside
from conadv_lab.training.reducer import Reducer
from tests.capture.recording import Listening
from tests.capture.test_fallbacks import cuda  # noqa: F401
from tests.capture.test_recording import Training
from tests.capture.test_step import CPU


class Shared(Training):
    """A training whose gradients and statistics are summed over the ranks of a world."""

    def __init__(self, method: str) -> None:
        super().__init__(method, captured=True)
        share_statistics(self.model, dist.group.WORLD)
        self.reducer = Reducer(self.model, dist.group.WORLD)

    def listened(self) -> "Shared":
        """After steps that make first checks: every later one is recorded."""
        self.take(0, 1)
        self.backend = Listening()
        self.program.replays = Replays(self.backend)
        return self

    def take(self, *numbers: int) -> "Shared":
        def reduced(gradient):
            self.reducer.begin(0)
            return self.reducer.finish(gradient(), check=True)

        for number in numbers:
            step = self.feed.load(number, [0.1 / (1 + number)] * len(self.optimizer.param_groups))
            self.losses.append(self.program(step, reduced).clean.item())
        return self


@pytest.fixture(autouse=True, scope="module")
def _world():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def segments(training: Shared) -> list[list]:
    """Of the two latest steps, by segment; they are of one kind."""
    first, second = (one.signature() for one in training.backend.recordings[-2:])
    assert first == second
    return first


@pytest.mark.parametrize("method", ["vanilla", "conadv"])
def test_segments_end_where_messages_are_sent(method):
    training = Shared(method).listened().take(2, 3)
    passes, statistics, update = segments(training)
    assert any("convolution_backward" in name for name, _ in passes)
    assert not any("convolution" in name for name, _ in (*statistics, *update))
    assert any("lerp" in name for name, _ in statistics), "running statistics are updated with the averages"
    assert any("fused_sgd" in name for name, _ in update)


def test_over_one_rank_sums_change_nothing():
    """Losses are scaled by shares that add up to 1, statistics multiplied and divided by the number of groups."""
    shared = Shared("conadv").take(*range(5))
    alone = Training("conadv", captured=False).take(*range(5))
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(shared.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_message_within_a_segment_is_refused(monkeypatch):
    training = Shared("conadv").listened()
    monkeypatch.setattr(synchronised, "outside", lambda call: call())
    with pytest.raises(
        ValueError, match=r"capture is 'on', but c10d\.allreduce_\.default sends a message; allowed"
    ):
        training.take(2)


def test_a_read_after_a_message_is_refused():
    training = Shared("conadv").listened()
    weight = next(training.model.parameters())
    training.optimizer.register_step_pre_hook(lambda *_: weight.grad.sum().item())
    with pytest.raises(ValueError, match="reads a value back"):
        training.take(2)


def test_a_buffer_that_is_new_in_every_step_is_seen():
    training = Shared("vanilla").listened().take(2)
    for bucket in training.reducer.buckets:
        bucket.flat = torch.zeros_like(bucket.flat)
        parts = bucket.flat.split([p.numel() for p in bucket.parameters])
        bucket.views = [part.view_as(p) for part, p in zip(parts, bucket.parameters, strict=True)]
    training.take(3)
    with pytest.raises(AssertionError):
        segments(training)


def test_nothing_is_sent_before_all_graphs_are_captured(cuda, monkeypatch):  # noqa: F811
    done: list[str] = []
    made: list[str] = []

    class Graph:
        def __init__(self) -> None:
            made.append(f"graph {len(made)}")
            self.name = made[-1]

        def replay(self) -> None:
            done.append(self.name)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def part() -> str:
        assert is_captured()
        for name in ("statistics", "gradients"):
            outside(lambda name=name: done.append(name))
        assert done == []
        return "losses"

    result, replay = CudaGraphs(CPU).capture(part)
    assert result == "losses"
    assert not is_captured()
    assert done == ["graph 0", "statistics", "graph 1", "gradients", "graph 2"]
    replay()
    assert done == 2 * done[:5]


def test_where_a_later_graph_fails_nothing_has_been_sent(cuda):  # noqa: F811
    sent: list[str] = []

    def part() -> None:
        outside(lambda: sent.append("gradients"))
        torch.ones(1).item()

    with pytest.raises(CannotCapture, match=r"does what a graph cannot hold, such as \.item\(\)"):
        CudaGraphs(CPU).capture(part)
    assert sent == []
    assert not is_captured()
