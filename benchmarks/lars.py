"""The time of a LARS step on ResNet-50's parameters, beside other implementations and torch's SGD.

    python -m benchmarks.lars [--json FILE]

The peer is the fastest other LARS found: ``pytorch_optimizer`` (an optional package: pip install pytorch_optimizer),
over parameters and multi-tensor. The loop is the straightforward LARS, one parameter after another. torch's SGD with
momentum and weight decay is the floor: LARS reads weights and gradients once more for their norms. Parameters have
ResNet-50's shapes but no model, with batch norm and biases in the skip list where the implementation has one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.harness import GPU_REPEATS, Options, Row, interleaved, publish
from conadv_lab.cli import asked
from conadv_lab.optim.lars import LARS

SETTINGS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's parameters: 161 tensors, 25,557,032 elements (He et al. 2016, table 1)."""
    shapes: list[tuple[int, ...]] = []

    def convolution(inputs: int, outputs: int, side: int) -> None:
        shapes.extend([(outputs, inputs, side, side), (outputs,), (outputs,)])  # and its batch norm

    convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def parameters(device: str) -> list[torch.nn.Parameter]:
    """Random parameters of those shapes, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in resnet50_shapes():
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(device))
        param.grad = torch.randn(shape, generator=generator).mul_(0.01).to(device)
        made.append(param)
    return made


def grouped(device: str) -> list[dict[str, Any]]:
    params = parameters(device)
    return [
        {"params": [param for param in params if param.ndim > 1]},
        {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0, "adapt": False},
    ]


class LoopLARS(torch.optim.Optimizer):
    """LARS, variant B, the straightforward way: one parameter after another, without reading values back."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {**defaults, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                gradient = param.grad
                if group["adapt"]:
                    weight, slope = param.norm(), gradient.norm()
                    ratio = 0.001 * weight / (slope + group["weight_decay"] * weight + 1e-8)
                    ratio = torch.where((weight > 0) & (slope > 0), ratio, torch.ones_like(ratio))
                    gradient = (gradient + group["weight_decay"] * param) * ratio
                velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
                velocity.mul_(group["momentum"]).add_(gradient)
                param.sub_(group["lr"] * velocity)


def competitors(device: str) -> dict[str, Callable[[], Any]]:
    """One step of each implementation, on separate parameters."""
    steps: dict[str, Callable[[], Any]] = {
        f"lars {v}": LARS(grouped(device), variant=v, **SETTINGS).step for v in ("A", "B", "C")
    }
    steps["loop"] = LoopLARS(grouped(device), **SETTINGS).step
    steps["sgd (the floor)"] = torch.optim.SGD(grouped(device), **SETTINGS).step
    try:
        from pytorch_optimizer import LARS as Theirs
    except ImportError:
        print("pytorch_optimizer is not installed, so it is not compared: pip install pytorch_optimizer")
    else:
        # It finds its skip list itself. It overwrites the gradients, which the trust ratio keeps from
        # growing or vanishing over the rounds.
        for name, foreach in (("pytorch_optimizer loop", False), ("pytorch_optimizer foreach", True)):
            steps[name] = Theirs(parameters(device), foreach=foreach, **SETTINGS).step
    return steps


def measure(device: str, rounds: int) -> list[Row]:
    """One row per implementation; ours are compared with the fastest other LARS, on CUDA with the loop."""
    cuda = device == "cuda"
    times = interleaved(competitors(device), rounds, cuda=cuda, repeats=GPU_REPEATS if cuda else 1)
    others = [name for name in times.seconds if not name.startswith(("lars", "sgd"))]
    peer = "loop" if cuda else min(others, key=times.median)
    return [times.row(name, peer if name.startswith("lars") else None) for name in times.seconds]


@dataclass(frozen=True)
class LarsOptions(Options):
    rounds: int = 25


def main() -> None:
    options = asked(LarsOptions, None, "benchmarks.lars", "Time a LARS step on ResNet-50's parameters.")
    rows = measure("cpu", options.rounds)
    if torch.cuda.is_available():
        for row in measure("cuda", 4 * options.rounds):
            peer = f"{row.peer} (cuda)" if row.peer else None
            rows.append(replace(row, name=f"{row.name} (cuda)", peer=peer))
    publish(rows, options.json)


if __name__ == "__main__":
    main()
