"""The model is run in full float32, whatever was allowed outside, and what was allowed is so again afterwards."""

import pytest
import torch
from torch import nn

from conadv_lab.sharpness import measure
from conadv_lab.sharpness.problem import arithmetic

BACKENDS = torch.backends


class Noting(nn.Linear):
    """Notes how float32 is multiplied where its forward runs, and its backward."""

    def forward(self, x):
        note(self.seen)
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: note(self.seen))
        return y


def note(seen: set) -> None:
    seen.add((
        torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32, BACKENDS.cudnn.conv.fp32_precision,
        BACKENDS.cuda.matmul.fp32_precision,
    ))  # fmt: skip


def allowed() -> tuple:
    return (
        BACKENDS.cuda.matmul.fp32_precision, BACKENDS.cudnn.conv.fp32_precision,
        BACKENDS.cudnn.rnn.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision,
    )  # fmt: skip


@pytest.fixture(params=["default", "high", "newer"])
def permitted(request, monkeypatch):
    """What torch allows itself by default, by the older switch, and by newer ones beside it, as on a GPU."""
    monkeypatch.setattr(arithmetic, "_gpu_in_use", lambda: True)
    cuda = BACKENDS.cuda.matmul.fp32_precision
    if request.param == "high":
        torch.set_float32_matmul_precision("high")
    if request.param == "newer":
        BACKENDS.cuda.matmul.fp32_precision = "tf32"
        BACKENDS.cudnn.rnn.fp32_precision = "ieee"
    before = allowed()
    yield before
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cuda.matmul.fp32_precision = cuda


def test_full_float32_within_and_as_before_outside(permitted):
    model = Noting(4, 3)
    model.seen = set()
    batch = (torch.randn(9, 4), torch.randint(0, 3, (9,)))
    measure(model, nn.CrossEntropyLoss(), [batch, batch], ("top_eigenvalue", "sam_worst", "trace"), steps=4)
    assert model.seen == {("highest", False, "ieee", "ieee")}
    assert allowed() == permitted
