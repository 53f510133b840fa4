"""The average of the weights, against torch's own."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
from conadv_lab.training.weights import average_of
from tests.conftest import small_cnn


@pytest.mark.parametrize("dtypes", ["one", "two"])
def test_an_average_is_torchs_bit_for_bit(dtypes):
    """Buffers, which are copied, are numbers of several kinds."""
    torch.manual_seed(0)
    model = mixture_batch_norm(small_cnn())
    if dtypes == "two":
        model[-1].double()
        model.insert(len(model) - 1, Double())
    ours = average_of(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        with one_update(model), branch_of(model, "adversarial"):
            model(torch.rand(4, 2, 6, 6)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_without_a_decay_there_is_none():
    assert average_of(small_cnn(), 0.0) is None


class Double(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.double()
