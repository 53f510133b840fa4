"""The same five ConAdv steps for every loop: two ghost groups a step, in float64, from images of our own loop."""

from pathlib import Path

import torch
from torch import Tensor, nn

import conadv_lab as cl
from conadv_lab.config import Config
from conadv_lab.training.loop import Run, prepare

STEPS, GROUP, LR, STALENESS = 5, 8, 0.1, 2


class Doubled(nn.Module):
    """A network in float64 of images in float32, as our own loop has them."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.network = nn.Sequential(
                nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Flatten(), nn.Linear(8 * 4, classes),
            ).double()  # fmt: skip

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network(pixel_values.double())


def network(_config: Config) -> nn.Module:
    return Doubled()


def converted() -> nn.Module:
    return cl.mixture_batch_norm(Doubled())


def method() -> cl.ConAdv:
    """Without random starts: an image's place, which they depend on, is another in another loader."""
    attack = cl.SignAttack(0.1, random_start=False)
    return cl.ConAdv(attack, staleness=STALENESS, weights=(0.5, 0.5))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def our_run(out: Path) -> Run:
    """The run that `conadv_lab.train` would make."""
    config = Config().replace(
        dataset="digits", model=f"{__file__}:network", method="conadv", staleness=STALENESS, epsilon=0.1,
        weights=(0.5, 0.5), optimizer="sgd", lr=LR, momentum=0.0, weight_decay=0.0, schedule="constant",
        lr_rule="none", warmup_epochs=0.0, steps=STEPS, global_batch=2 * GROUP, micro_batch=GROUP, bn_recalibrate=0,
        threads=1, device="cpu", random_start=False,
    )  # fmt: skip
    run = prepare(config, out, progress="none")
    assert run is not None
    return run


def trained_by_us(out: Path) -> dict[str, Tensor]:
    run = our_run(out)
    run.to_the_end()
    return run.parts.model.state_dict()


def batches(out: Path) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of our loop's steps, one after another."""
    stream = our_run(out).parts.stream
    return [(b.images, b.labels) for number in range(STEPS) for b in stream.step(number).batches()]
