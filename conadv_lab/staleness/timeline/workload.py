"""A recipe as far as time is concerned: numbers of images, steps and bytes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from conadv_lab.config import Config, check
from conadv_lab.mistakes import ABOVE_0, COUNT, COUNT_OR_0, require_ranges, unknown
from conadv_lab.recipes import RECIPES, find
from conadv_lab.recipes.imagenet import IMAGENET_IMAGES as IMAGENET

MODELS = {"digits-cnn": 72_666, "resnet18": 11_173_962, "resnet20": 272_474, "resnet50": 25_557_032}
"""Numbers of parameters; a test counts them."""
TRAINING_IMAGES = {"digits": 898, "cifar10": 50_000, "cifar100": 50_000, "imagenet": IMAGENET}
VALUES = {"digits": 64, "cifar10": 3 * 32**2, "cifar100": 3 * 32**2, "imagenet": 3 * 224**2}


@dataclass(frozen=True)
class Workload:
    """A recipe as the timeline sees it.

    Attributes:
        model: key of a cluster's compute constants.
        images: number of training images.
        epochs: number of epochs.
        global_batch: images per step.
        parameters: of the model; bytes_each: per gradient value on the network.
        values: per image; the attack sends one bit for each.
        staleness: τ of the recipe; None: each method's own.
        micro_batch: largest number of images per pass; None for no limit.
        joint: clean and adversarial images share one pass of twice the size, instead of separate passes. This
            package uses separate passes, each through its own batch norm branch.
        fixed_steps: instead of epochs.
        precision: of the arithmetic, such as bfloat16; None: that of the cluster's constants.
        config: of the recipe, from which methods take their other options.
    """

    name: str
    model: str
    images: int
    epochs: float
    global_batch: int
    parameters: int
    bytes_each: int = 2
    values: int = 3 * 224**2
    staleness: int | None = None
    micro_batch: int | None = None
    joint: bool = False
    fixed_steps: int | None = None
    precision: str | None = None
    config: Config = field(default_factory=Config, repr=False)

    @property
    def steps(self) -> int:
        """Steps of the recipe, the same for every method.

        >>> workload_of("imagenet-resnet50-96k").steps
        1173
        """
        if self.fixed_steps is not None:
            return self.fixed_steps
        return max(1, round(self.epochs * self.images / self.global_batch))

    def replace(self, **fields: object) -> "Workload":
        """A checked copy with other values."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in fields:
            if name not in known:
                raise unknown("field of a workload", name, known)
        changed: Workload = dataclasses.replace(self, **fields)  # type: ignore[arg-type]
        _check(changed)
        return changed


def _workloads() -> dict[str, Workload]:
    smallest = RECIPES["imagenet-resnet50-4k"]
    configs = {name: recipe() for name, recipe in RECIPES.items() if name.startswith("imagenet-resnet50-")}
    smaller = {f"imagenet-resnet50-{k}k": smallest().replace(global_batch=1024 * k) for k in (1, 2)}
    return {name: _of_config(config, name) for name, config in (smaller | configs).items()}


def workload_of(recipe: "str | Config | Workload") -> Workload:
    """The workload of a recipe: one of `WORKLOADS`, a name from ``conadv_lab.train --list``, a config, or a workload.

    Raises:
        ValueError: an unknown recipe, or a user's model or data set, whose size is unknown.
    """
    if isinstance(recipe, Workload):
        _check(recipe)
        return recipe
    if isinstance(recipe, str):
        if recipe in WORKLOADS:
            return WORKLOADS[recipe]
        if recipe not in RECIPES and ".py:" not in recipe:
            raise unknown("recipe", recipe, [*WORKLOADS, *RECIPES])
        return _of_config(find(recipe)(), recipe)
    return _of_config(recipe, "config")


def _of_config(config: Config, name: str) -> Workload:
    check(config)
    data, training = config.data, config.training
    model = config.model.model
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    if data.dataset == "synthetic":
        images, values = data.synthetic_images, 3 * data.synthetic_pixels**2
    elif data.dataset in TRAINING_IMAGES:
        images, values = TRAINING_IMAGES[data.dataset], VALUES[data.dataset]
    else:
        raise unknown("dataset", data.dataset, [*TRAINING_IMAGES, "synthetic"])
    return Workload(
        name,
        model,
        min(images, data.train_images or images),
        training.epochs,
        training.global_batch,
        MODELS[model],
        bytes_each=4,  # gradients are float32, even under autocast
        values=values,
        staleness=config.method.staleness,
        micro_batch=training.micro_batch,
        fixed_steps=training.steps,
        precision=config.model.precision,
        config=config,
    )


def _check(workload: Workload) -> None:
    names = ("images", "global_batch", "parameters", "bytes_each", "values", "micro_batch", "fixed_steps")
    require_ranges(workload, **dict.fromkeys(names, COUNT), epochs=ABOVE_0, staleness=COUNT_OR_0)


WORKLOADS: Mapping[str, Workload] = _workloads()
"""ResNet-50 on ImageNet for 90 epochs: the recipes of that name, and the smallest of them at batch 1,024 and 2,048."""
