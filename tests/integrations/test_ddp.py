"""A hand-written loop over two ranks takes the steps of our own; the trainers that own the loop refuse two."""

import sys

import pytest
import torch

from tests.integrations.conftest import assert_equal_parameters
from tests.integrations.five_steps import converted
from tests.training.world import World, processes


@pytest.mark.slow
def test_five_steps_over_two_ranks_are_those_of_our_loop(ours, batches, tmp_path):
    torch.save(batches, tmp_path / "batches.pt")
    command = [sys.executable, "-m", "tests.integrations.ddp_five"]
    ranks = processes([*command, str(tmp_path / "batches.pt"), str(tmp_path / "out.pt")], 2)
    assert World(ranks).wait() == [0, 0]
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    model = converted()
    assert not torch.equal(model.state_dict()["network.0.weight"], state["network.0.weight"])
    model.load_state_dict(state)
    assert_equal_parameters(model, ours)


@pytest.mark.slow
def test_the_adapters_refuse_two_ranks_and_say_what_works(tmp_path):
    for library in ("lightning", "transformers", "accelerate"):
        pytest.importorskip(library, reason="the extra [adapters] is not installed")
    ranks = processes([sys.executable, "-m", "tests.integrations.refused_ranks", str(tmp_path)], 2)
    for rank in ranks:
        said = rank.communicate(timeout=300)[0]
        assert rank.returncode == 0, said
        for trial in ("by_accelerate", "by_trainer", "by_lightning"):
            (line,) = [line for line in said.splitlines() if line.startswith(trial)]
            assert "2 processes; allowed: 1, with any method" in line
            assert "a script with DistributedDataParallel, as in docs/ddp.md, or conadv_lab.train" in line
