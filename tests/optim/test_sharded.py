"""LARS and LAMB on weights that two ranks share equal one process; what they cannot take is refused.

``python -m tests.optim.test_sharded FILE`` is one rank, whose first one writes the weights that came of each case.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.lamb import LAMB
from conadv_lab.optim.lars import LARS
from conadv_lab.training.weights import load_optimizer
from tests.training.world import World, processes

CASES = {f"lars-{variant}": (LARS, {"lr": 0.7, "variant": variant}) for variant in "ABC"} | {
    "lamb": (LAMB, {"lr": 0.05})
}
STEPS = 4


def network() -> nn.Module:
    """Weights of 3 and of 1 rows, which two ranks cannot share equally, and one of zeros."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    nn.init.zeros_(made[2].weight)
    return made


def trained(model: nn.Module, name: str, rows: slice) -> None:
    kind, settings = CASES[name]
    optimizer = kind(parameter_groups(model, 0.01), **settings)
    draw = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.rand(6, 4, generator=draw, dtype=torch.float64)[rows]
        model(x).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # as through a checkpoint
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def one_rank(file: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    rank, found = dist.get_rank(), {}
    for name, (kind, settings) in CASES.items():
        model = network()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained(model, name, slice(3 * rank, 3 * rank + 3))
        found[name] = [parameter.full_tensor() for parameter in model.parameters()]
        twice = nn.Parameter(distribute_tensor(torch.tensor([[3.0, 4.0]]), mesh, [Replicate()]))
        optimizer = kind([twice], **settings)
        twice.grad = distribute_tensor(torch.tensor([[0.0, 2.0]]), mesh, [Replicate()])
        optimizer.step()
        found[f"{name}-replicated"] = [twice.full_tensor()]
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    file = tmp_path / "weights.pt"
    world = World(processes([sys.executable, "-m", "tests.optim.test_sharded", str(file)], 2))
    assert world.wait() == [0, 0]
    found: dict[str, list[Tensor]] = torch.load(file)
    for name, (kind, settings) in CASES.items():
        model = network()
        before = copy.deepcopy(model)
        trained(model, name, slice(None))
        for got, expected, start in zip(found[name], model.parameters(), before.parameters(), strict=True):
            assert torch.allclose(got, expected, rtol=0, atol=1e-12), name
            assert not torch.equal(got, start), name
        alone = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer = kind([alone], **settings)
        alone.grad = torch.tensor([[0.0, 2.0]])
        optimizer.step()
        assert torch.allclose(found[f"{name}-replicated"][0], alone), name


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_complex_weights_are_refused_by_name(kind):
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=rf"parameter 1 of {kind.__name__} is torch\.complex64; allowed: real"
    ):
        kind([nn.Parameter(torch.ones(1)), weight], lr=0.1)
    with pytest.raises(ValueError, match=rf"parameter 'spectrum' of {kind.__name__} is torch\.complex64"):
        kind([("spectrum", weight)], lr=0.1)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_pieces_of_a_flat_parameter_are_refused(kind):
    """As FullyShardedDataParallel marks them, whose pieces have norms of their own."""
    weight = nn.Parameter(torch.ones(2, 3))
    weight._fsdp_flattened = True
    with pytest.raises(
        ValueError, match=r"a piece of FullyShardedDataParallel's flat parameter.*fully_shard"
    ):
        kind([weight], lr=0.1)


KINDS = {
    "lars": lambda params: LARS(params, lr=0.1),
    "lamb": lambda params: LAMB(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_state_that_does_not_fit_is_refused_when_it_is_loaded(name):
    def stepped(*shapes: tuple[int, ...]) -> torch.optim.Optimizer:
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = KINDS[name](params)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return optimizer

    optimizer = stepped((2, 3), (4,))
    with pytest.raises(
        ValueError, match=r"in runs/x does not match the optimizer: .* parameter 1 has shape \(5,\).*\(4,\)"
    ):
        load_optimizer(optimizer, stepped((2, 3), (5,)).state_dict(), "runs/x")
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters; allowed for this \w+: \[2\]"):
        load_optimizer(optimizer, stepped((2, 3)).state_dict(), "runs/x")
    load_optimizer(optimizer, stepped((2, 3), (4,)).state_dict(), "runs/x")
    if name != "sgd":  # torch's own says so at the next step only
        with pytest.raises(ValueError, match="has shape"):
            optimizer.load_state_dict(stepped((2, 3), (5,)).state_dict())


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
