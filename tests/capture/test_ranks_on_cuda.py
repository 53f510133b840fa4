"""What only two GPUs can show: over two ranks a run of captured steps is that of plain steps."""

import sys
from pathlib import Path

import pytest
import torch

from conadv_lab.runs import RunFolder
from tests.training import world
from tests.training.test_ranks import distance

RUN = [
    "digits-vanilla", "--model", f"{world.__file__}:network", "--train-images", "90", "--global-batch", "32",
    "--micro-batch", "16", "--steps", "50", "--warmup-epochs", "0", "--bn-recalibrate", "0", "--log-every", "7",
    "--precision", "float64", "--no-channels-last", "--crop", "1", "--checkpoint-every", "1000",
]  # fmt: skip
METHODS = ("vanilla", "disadv", "conadv", "recycled", "sam", "conadv-sam")
OPTIMIZERS = {"sgd": [], "lars": ["--optimizer", "lars", "--lr", "2"]}


def trained(out: Path, *options: str, device: str = "cuda") -> Path:
    """A run over two ranks, one GPU each."""
    command = [
        sys.executable,
        "-m",
        "conadv_lab.train",
        *RUN,
        "--device",
        device,
        *options,
        "--out",
        str(out),
    ]
    ranks = world.World(world.processes(command, 2))
    assert ranks.wait() == [0, 0]
    return out


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_of_two_ranks_are_the_steps(method, optimizer, tmp_path):
    """To rounding, through cold and warm statistics; ``on`` would end a run whose steps cannot be captured."""
    options = ["--method", method, *OPTIMIZERS[optimizer]]
    eager = trained(tmp_path / "eager", *options, "--capture", "off")
    assert distance(eager, trained(tmp_path / "captured", *options, "--capture", "on")) < 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_they_are_bitwise_with_deterministic_algorithms(tmp_path):
    options = ["--method", "conadv", "--deterministic"]
    runs = [trained(tmp_path / choice, *options, "--capture", choice) for choice in ("off", "on")]
    assert distance(*runs) == 0


@pytest.mark.slow
def test_the_run_itself_is_one_that_two_ranks_can_train(tmp_path):
    """On a CPU, so that the command is tried before two GPUs are there."""
    out = trained(
        tmp_path / "cpu", "--method", "conadv", *OPTIMIZERS["lars"], "--capture", "off", device="cpu"
    )
    assert RunFolder(out).result()["steps"] == 50
