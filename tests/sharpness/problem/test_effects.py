"""A missing gradient is no proof of no effect."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from tests.elsewhere import elsewhere
from tests.sharpness.oracle import difference_hessian
from tests.sharpness.zoo import real

X, Y = real(20, 4), torch.arange(20) % 3


class Two(nn.Module):
    """Two layers, the first of which is hidden from gradients in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.way = nn.Linear(4, 5), nn.Linear(5, 3), way

    def first(self, x: Tensor) -> Tensor:
        return self.a(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "reentrant":
            return self.b(checkpoint(self.first, x, use_reentrant=True))
        if self.way == "reentrant, all":
            return checkpoint(lambda t: self.b(self.first(t)), x, use_reentrant=True)
        if self.way == "reentrant, the second":
            return checkpoint(self.b, self.first(x), use_reentrant=True)
        if self.way == "not reentrant":
            return self.b(checkpoint(self.first, x, use_reentrant=False))
        if self.way == "inference mode":
            with torch.inference_mode():
                hidden = self.first(x)
            return self.b(hidden.clone())
        if self.way == "inference mode, all":
            with torch.inference_mode():
                return self.b(self.first(x))
        return self.b(self.first(x).detach())


def problem(way: str, params: list[str] | None = None) -> Problem:
    return Problem(
        Two(way).double(), nn.CrossEntropyLoss(), [(X[:12], Y[:12]), (X[12:], Y[12:])], params=params
    )


FIRST = "parameter 'a.weight', 'a.bias' changes the loss, but no gradient reaches it: reentrant checkpointing"
ALL = "parameter 'a.weight', 'a.bias', 'b.weight', 'b.bias' changes the loss, but no gradient"
REFUSED = {
    "reentrant": FIRST,
    "reentrant, all": ALL,
    "reentrant, the second": "pass use_reentrant=False to torch.utils.checkpoint",
    "inference mode": FIRST,
    "inference mode, all": ALL,
    "detached": FIRST,
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("way", REFUSED)
def test_parameters_that_only_lack_a_gradient_are_not_left_out(way):
    with pytest.raises(ValueError, match=REFUSED[way]):
        problem(way)


def test_the_way_out_works():
    found = Hessian(problem("not reentrant")).dense()
    truth = difference_hessian(Two("not reentrant").double(), nn.CrossEntropyLoss(), X, Y)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-8)
    assert problem("detached", ["b"]).size == 18


def test_inference_mode_around_a_measurement_is_named():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode is on"):
        problem("not reentrant")


def test_parameters_without_effect_are_still_left_out():
    model = Two("not reentrant").double()
    model.spare = nn.Linear(2, 2).double()
    with pytest.warns(UserWarning, match=r"left out \(no effect on the loss\): 'spare.weight'"):
        found = Problem(model, nn.CrossEntropyLoss(), (X, Y))
    assert found.left_out == ("spare.weight", "spare.bias")


def test_a_loss_that_reads_the_weights_itself_is_refused():
    model = Two("not reentrant").double()

    def penalised(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets) + 0.1 * model.a.weight.square().sum()

    with pytest.raises(ValueError, match=r"reads the model's parameter 'a.weight' directly"):
        Problem(model, penalised, (X, Y))


def test_a_random_loss_does_not_move_the_loaders_numbers():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            return X[index] + torch.randn(4), Y[index]

    def noisy(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output + torch.randn(output.shape[1]), targets)

    loader = torch.utils.data.DataLoader(Noisy(), batch_size=len(X))
    problem = Problem(Two("not reentrant").double(), noisy, loader)
    assert problem.value() == problem.initial_loss


def test_hidden_parameters_are_found_wherever_the_default_device_is():
    model = Two("detached").double()
    with elsewhere(), pytest.raises(ValueError, match=FIRST):
        Problem(model, nn.CrossEntropyLoss(), (X, Y))
