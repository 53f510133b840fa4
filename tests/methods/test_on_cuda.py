"""What only a GPU can show: the side stream's result, and that no step makes the host wait. Skipped without one."""

import copy

import pytest
import torch
from torch import nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.base import Vanilla
from conadv_lab.methods.families.conadv import ConAdv, DisAdv
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.methods.placement import SideStream
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.optim.momenta import begin_momenta
from tests.conftest import image_set, small_cnn

pytestmark = pytest.mark.gpu
STEPS = 16


class Steps:
    """A training on the GPU in float64, step by step."""

    def __init__(self, method, micro_batch: int = 16) -> None:
        device = torch.device("cuda")
        self.method, self.model = method, mixture_batch_norm(small_cnn().double()).to(device)
        batch = round(16 * method.clean_fraction)
        self.stream = Stream(
            image_set(64).to(device),
            seed=5,
            batch=batch,
            first_batch=16,
            steps=STEPS,
            micro_batch=min(batch, micro_batch),
            augment=lambda images, epochs, indices: images.double(),
        )
        # One object for all steps, as in a run: a new criterion is checked, and a check makes the host wait.
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9, fused=True)
        self.optimizer.register_step_pre_hook(begin_momenta)

    def take(self, numbers: range) -> None:
        for number in numbers:
            step = self.stream.step(number, self.method.lookahead)
            self.method.backward(self.model, step, self.criterion)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("attack", [SignAttack(0.1), PGDAttack(0.1, 0.05, steps=3)], ids=["sign", "pgd"])
def test_the_side_stream_gives_what_serial_gives(attack, staleness, micro_batch):
    """Through cold and warm statistics; to rounding, as a GPU's sums have no fixed order."""
    states = []
    for placement in (None, SideStream(torch.device("cuda"))):
        steps = Steps(ConAdv(copy.deepcopy(attack), staleness, placement=placement), micro_batch)
        steps.take(range(STEPS))
        states.append(steps.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        Vanilla,
        lambda: DisAdv(SignAttack(0.1)),
        lambda: ConAdv(SignAttack(0.1)),
        lambda: ConAdv(SignAttack(0.1), placement=SideStream(torch.device("cuda"))),
        lambda: Recycled(0.1),
        lambda: Recycled(0.1, equal_cost=True),
    ],
    ids=["vanilla", "disadv", "conadv", "conadv-stream", "recycled", "recycled-equal"],
)
def test_no_step_makes_the_host_wait(make):
    steps = Steps(make())
    steps.take(range(STEPS - 3))  # past what happens once: checks, captures, warm statistics
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.take(range(STEPS - 3, STEPS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
