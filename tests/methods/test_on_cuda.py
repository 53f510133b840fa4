"""What only a GPU can show: real graphs and streams give what a plain step gives, and no step makes the host wait."""

import pytest
import torch
from torch import nn

from conadv_lab.capture.feed import Feed
from conadv_lab.capture.program import Program
from conadv_lab.capture.replays import CudaGraphs
from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Stream
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.lanes import Lanes, Streams
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.optim.momenta import begin_momenta
from tests.conftest import double, image_set, small_cnn

pytestmark = pytest.mark.gpu
STEPS = 50


class Steps:
    """A training on the GPU in float64, step by step."""

    def __init__(
        self, name: str, captured: bool, beside: bool = False, micro_batch: int = 16, **options
    ) -> None:
        device = torch.device("cuda")
        self.method = method_of(resolved(Config().replace(method=name, epsilon=0.1, **options)))
        self.method.lanes = Streams(device) if beside else Lanes()
        self.model = mixture_batch_norm(small_cnn().double()).to(device)
        first, batch = round(20 * max(1, self.method.new_fraction)), round(20 * self.method.new_fraction)
        self.stream = Stream(
            image_set(64).to(device), seed=5, batch=batch, first_batch=first, steps=STEPS,
            micro_batch=min(batch, micro_batch), augment=double,
            replays=getattr(self.method, "replays", 1),
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9, fused=True)
        self.optimizer.register_step_pre_hook(begin_momenta)
        self.method.attach(self.optimizer)
        self.feed = Feed(self.stream, self.method.lookahead, device, 1)
        self.program = Program(
            self.model, self.model, self.method, self.optimizer, nn.CrossEntropyLoss(label_smoothing=0.1),
            rates=self.feed.block.rates, backend=CudaGraphs(device) if captured else None, required=True,
        )  # fmt: skip

    def take(self, numbers: range) -> "Steps":
        for number in numbers:
            self.program(self.feed.load(number, [0.2 / (1 + number)]))
        return self


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("micro_batch", [20, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_is_the_step(name, micro_batch, beside):
    """Through cold and warm statistics; to rounding, as a GPU's sums have no fixed order."""
    eager = Steps(name, captured=False, micro_batch=micro_batch).take(range(STEPS))
    captured = Steps(name, captured=True, beside=beside, micro_batch=micro_batch).take(range(STEPS))
    assert captured.program.replays.graphs
    for key, value in eager.model.state_dict().items():
        torch.testing.assert_close(captured.model.state_dict()[key], value, rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("staleness", [1, 3])
def test_streams_give_the_same_without_a_graph(staleness):
    eager = Steps("conadv", captured=False, staleness=staleness).take(range(STEPS))
    beside = Steps("conadv", captured=False, beside=True, staleness=staleness).take(range(STEPS))
    for key, value in eager.model.state_dict().items():
        torch.testing.assert_close(beside.model.state_dict()[key], value, rtol=0, atol=1e-9, msg=key)


def test_captured_steps_are_bitwise_with_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        eager = Steps("conadv", captured=False).take(range(STEPS))
        captured = Steps("conadv", captured=True, beside=True).take(range(STEPS))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(v, captured.model.state_dict()[k]) for k, v in eager.model.state_dict().items())


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_no_step_makes_the_host_wait(name, captured):
    steps = Steps(name, captured)
    steps.take(range(STEPS - 5))  # past what happens once: checks, captures, warm statistics
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.take(range(STEPS - 5, STEPS - 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_forward_that_reads_a_value_back_runs_as_it_is_with_one_line():
    class Reads(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x) * (2.0 if x.mean().item() < 9 else 1.0)

    said: list[str] = []
    steps = Steps("vanilla", captured=True)
    steps.program.network = Reads(steps.model)
    steps.program.required, steps.program.told = False, said.append
    steps.take(range(10))
    assert len(said) == 1
    assert said[0].startswith("steps are not captured: ")
    assert not steps.program.captures
