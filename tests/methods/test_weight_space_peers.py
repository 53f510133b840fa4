"""Side by side with pytorch_optimizer's sharpness-aware optimizers, whose rule is the papers' in part.

pip install --no-deps pytorch_optimizer==4.1.0
"""

import pytest
import torch
from torch import Tensor, nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.families.looksam import LookSAM
from conadv_lab.methods.families.sam import ASAM, SAM
from tests.conftest import double, image_set

peers = pytest.importorskip("pytorch_optimizer")

STEPS, OPTIONS = 10, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
CRITERION = nn.CrossEntropyLoss()


def stream() -> Stream:
    return Stream(image_set(40), seed=1, batch=16, steps=STEPS, augment=double)


def network(tensors: str) -> nn.Module:
    """Without batch norm: theirs may count a step's statistics twice, ours never does."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 6, 3, stride=2, bias=tensors == "weights and biases")
    last = nn.Linear(6 * 4, 4, bias=tensors == "weights and biases")
    one = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 4, bias=False))
    return (one if tensors == "one weight" else nn.Sequential(first, nn.Tanh(), nn.Flatten(), last)).double()


def ours(method, tensors: str) -> Tensor:
    model = network(tensors)
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    for number in range(STEPS):
        method.backward(model, stream().step(number), CRITERION)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def theirs(kind, tensors: str, **options) -> Tensor:
    model = network(tensors)
    optimizer = kind(model.parameters(), torch.optim.SGD, **options, **OPTIONS)
    for number in range(STEPS):
        (batch,) = stream().step(number).batches()

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = CRITERION(model(batch.images), batch.labels)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("tensors", ["one weight", "weights", "weights and biases"])
def test_sam_is_theirs(tensors):
    """To float32's rounding: their global norm is one, whatever the weights are."""
    assert distance(ours(SAM(0.1), tensors), theirs(peers.SAM, tensors, rho=0.1)) < 1e-6


def test_asam_is_theirs_without_eta_where_all_is_a_weight():
    found = theirs(peers.SAM, "weights", rho=0.5, adaptive=True)
    assert distance(ours(ASAM(0.5, eta=0.0), "weights"), found) < 1e-6
    assert distance(ours(ASAM(0.5), "weights"), found) > 1e-5  # the paper's class has 0.01


def test_asam_scales_biases_in_theirs_and_not_in_the_papers_code():
    """T is 1 for biases in the authors' code, and |b| in pytorch_optimizer."""
    found = theirs(peers.SAM, "weights and biases", rho=0.5, adaptive=True)
    assert distance(ours(ASAM(0.5, eta=0.0), "weights and biases"), found) > 1e-4


def test_looksam_is_theirs_where_there_is_one_weight():
    found = theirs(peers.LookSAM, "one weight", rho=0.1, k=3, alpha=0.7)
    assert distance(ours(LookSAM(0.1, every=3, alpha=0.7), "one weight"), found) < 1e-6


def test_looksam_projects_tensor_by_tensor_in_theirs_and_over_all_weights_in_the_paper():
    """Norms and the projection of g_s on g are each tensor's own in pytorch_optimizer."""
    found = theirs(peers.LookSAM, "weights", rho=0.1, k=3, alpha=0.7)
    assert distance(ours(LookSAM(0.1, every=3, alpha=0.7), "weights"), found) > 1e-5
