"""From a config to the objects of a run. Everything that can be wrong is found here, before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv_lab import references
from conadv_lab.config import Config, check_method
from conadv_lab.criteria import logits
from conadv_lab.data.augment import alternating_flips, augment
from conadv_lab.data.hashing import image_keys
from conadv_lab.data.loader import Augmentation, ImageSet, Split, Stream, as_float
from conadv_lab.data.sets import load_sets
from conadv_lab.methods import method_of
from conadv_lab.methods.base import Method
from conadv_lab.methods.families.conadv import ConAdv, Placement
from conadv_lab.methods.placement import Attacker, OtherRanks, SideStream
from conadv_lab.models.fast import WHITENING_IMAGES, FastCNN, fast_cnn, fast_cnn_small
from conadv_lab.models.norm import mixture_batch_norm, share_statistics
from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.schedule import Schedule
from conadv_lab.references import is_file_reference
from conadv_lab.seeds import derived_seed, generator
from conadv_lab.training.distributed import ALONE, FIRST_PATIENCE, Ranks
from conadv_lab.training.process import settle

EVALUATION_BATCH = 500


@dataclass
class Parts:
    """The objects of one run."""

    config: Config
    device: torch.device
    train_set: ImageSet
    test_set: ImageSet
    model: nn.Module
    method: Method
    optimizer: Optimizer
    schedule: Schedule
    criterion: nn.Module
    stream: Stream
    ranks: Ranks = ALONE

    def calibration(self, part: slice = slice(None)) -> Iterator[Tensor]:
        """The images that the main statistics are re-estimated on, (n, C, H, W): training images as training sees them.

        Which images these are is always the same; each is augmented as in some epoch of the run, drawn by the seed.

        Args:
            part: which of the groups to make; all of them by default.
        """
        for epoch, index in self.calibration_groups()[part]:
            yield self.stream.images_of(epoch, index).images

    def calibration_groups(self) -> list[tuple[Tensor, Tensor]]:
        """Epochs (n,) and indices (n,) of each group of `calibration`."""
        count = min(self.config.training.bn_recalibrate, len(self.train_set))
        draw = generator(0, "calibration")
        chosen = torch.randperm(len(self.train_set), generator=draw, device="cpu")[:count]
        draw = generator(self.config.training.seed, "calibration epochs")
        epochs = torch.randint(self.stream.epochs, (count,), generator=draw, device="cpu")
        # Groups of one size: a small last one would weigh as much as a full one in the average.
        groups = max(1, round(count / EVALUATION_BATCH))
        return (
            list(zip(epochs.tensor_split(groups), chosen.tensor_split(groups), strict=True)) if count else []
        )


def build(config: Config, ranks: Ranks = ALONE) -> Parts:
    """All objects of a resolved config, the model with initial weights, in a process that is set up for it.

    Raises:
        ValueError: whatever the config asks for and cannot have.
    """
    with ranks.agreed():  # a rank that went no further would leave the others waiting in first_goes_first
        device = pick_device(config.training.device, ranks)
    settle(config, ranks, device)
    return assemble(config, device, ranks)


def assemble(config: Config, device: torch.device, ranks: Ranks = ALONE) -> Parts:
    """As `build`, but nothing is set for the whole process, as in one that measures.

    Raises:
        ValueError: as for `build`.
    """
    with ranks.first_goes_first():
        train_set, test_set = load_sets(config, device)
    model = build_model(config, train_set.classes).to(device)
    require_fit(model, train_set, config)
    if isinstance(model, FastCNN):
        model.fit_whitening(
            as_float(train_set.fetch(torch.arange(min(WHITENING_IMAGES, len(train_set)), device="cpu"))[0])
        )
        # Another machine's eigenvectors may differ in their last digits.
        ranks.take_from_first(model.whitening.weight)
    method = method_of(config)
    check_method(config, method)
    stream = build_stream(config, method, train_set, ranks)
    if config.method.placement != "serial":
        if not isinstance(method, ConAdv):
            raise ValueError(
                f"placement is {config.method.placement!r}; allowed for {type(method).__name__}: 'serial', as only "
                "ConAdv and its subclasses have their attack placed elsewhere"
            )
        method.placement = build_placement(config, stream, ranks, device)
    if ranks.trains and ranks.trainers > 1:
        share_statistics(model, ranks.training, spread=config.training.batch_norm == "sync")
    section = config.optimization
    groups = parameter_groups(model, section.weight_decay, section.bias_lr_factor)
    criterion = nn.CrossEntropyLoss(label_smoothing=section.label_smoothing)
    return Parts(
        config,
        device,
        train_set,
        test_set,
        model,
        method,
        build_optimizer(config, groups),
        build_schedule(config, stream),
        criterion,
        stream,
        ranks,
    )


@torch.no_grad()
def require_fit(model: nn.Module, images: ImageSet, config: Config) -> None:
    """Raise ``ValueError`` if augmentation or network cannot take the images, before anything is written."""
    two = torch.arange(2, device="cpu") % len(images)
    pixels = as_float(images.fetch(two)[0])
    augment = _augmentation(config)
    if augment is not None:
        places = two.to(pixels.device)
        pixels = augment(pixels, torch.zeros_like(places), places)
    pixels = pixels.to(next(model.parameters()).dtype)
    model.eval()
    try:
        outputs = logits(model(pixels))
    except RuntimeError as error:
        raise ValueError(
            f"model {config.model.model} cannot take the images of {config.data.dataset}, "
            f"{tuple(pixels.shape[1:])} each: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train()
    if outputs.shape != (2, images.classes):
        raise ValueError(
            f"model {config.model.model} gives {tuple(outputs.shape)} for 2 images; allowed: (2, {images.classes}), "
            "one output a class"
        )


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:0 …") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:0 …")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no GPU; allowed here: auto, cpu")
    if device.type == "cuda" and ranks.count > 1:
        # Where the site shows each rank its own GPU alone, that is number 0.
        device = torch.device("cuda", ranks.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def build_model(config: Config, classes: int) -> nn.Module:
    """The network with mixture batch norm, its weights decided by the run's seed alone."""
    name = config.model.model
    # On the CPU whatever the default device is: there the weights are the same for all.
    with torch.device("cpu"), torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.training.seed, "weights"))
        if is_file_reference(name):
            model = references.made(name, config, returns="a torch.nn.Module")
            if not isinstance(model, nn.Module):
                raise ValueError(f"{name} returned {type(model).__name__}; allowed: a torch.nn.Module")
        elif name == "digits-cnn":
            from conadv_lab.models.digits import DigitsCNN

            model = DigitsCNN(classes)
        elif name.startswith("timm:"):
            from conadv_lab.models.timm_models import timm_model

            model = timm_model(name.removeprefix("timm:"), classes)
        elif name.startswith("fast-cnn"):
            model = fast_cnn(classes) if name == "fast-cnn" else fast_cnn_small(classes)
        else:
            from conadv_lab.models import resnet

            model = getattr(resnet, name)(classes, config.model.last_gamma)
    model = mixture_batch_norm(model)
    if config.model.precision == "float64":
        model = model.double()
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_stream(config: Config, method: Method, train_set: ImageSet, ranks: Ranks = ALONE) -> Stream:
    training = config.training
    split = Split(ranks.number, ranks.trainers, training.batch_norm == "sync")
    if not ranks.trains:  # an attacker attacks whole groups, whoever trains on them
        split = Split(ranks.number - ranks.trainers, ranks.attackers)
    batch = round(training.global_batch * method.new_fraction)
    steps = training.steps or max(1, round(training.epochs * len(train_set) * method.replays / batch))
    kind: Any = Stream
    if config.data.dataset == "imagenet":
        from conadv_lab.data.imagenet_stream import PhotoStream

        kind = partial(PhotoStream, mixup=config.data.mixup)
    return kind(
        train_set,
        seed=training.seed,
        batch=batch,
        first_batch=max(batch, training.global_batch),
        steps=steps,
        # Images beyond the global batch come on top of each micro-batch's clean ones.
        micro_batch=round((training.micro_batch or batch) * max(1, method.new_fraction)),
        augment=_augmentation(config),
        split=split,
        replays=method.replays,
    )


def build_placement(config: Config, stream: Stream, ranks: Ranks, device: torch.device) -> Placement:
    """Where ConAdv's attack runs, on this rank."""
    if config.method.placement == "stream":
        return SideStream(device)
    if not ranks.trains:
        spread = config.training.batch_norm == "sync"
        trained = [Split(trainer, ranks.trainers, spread) for trainer in range(ranks.trainers)]
        return Attacker(stream, trained, ranks.weights)
    return OtherRanks(stream, ranks.trainers, ranks.attackers, ranks.weights, FIRST_PATIENCE)


def _augmentation(config: Config) -> Augmentation | None:
    data, seed = config.data, config.training.seed
    double = config.model.precision == "float64"
    photographs = data.dataset == "imagenet"  # they are augmented as they are read
    if photographs or not (data.crop or data.flip or data.cutout):
        return (lambda images, epochs, indices: images.double()) if double else None

    def augmented(images: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        keys = image_keys(seed, "augment", epochs, indices)
        flip: bool | Tensor = data.flip
        if data.flip_rule == "alternating":
            flip = alternating_flips(seed, epochs, indices)
        images = augment(
            images, keys, crop=data.crop, flip=flip, cutout=data.cutout, padding=data.crop_padding
        )
        return images.double() if double else images

    return augmented


def build_optimizer(config: Config, groups: list) -> Optimizer:
    section = config.optimization
    assert section.lr is not None, "the config is not resolved"
    if section.optimizer == "sgd":
        plain = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
        fused = _all_on_gpu(groups)
        sgd = torch.optim.SGD(
            plain, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov, fused=fused or None
        )
        if fused:
            from conadv_lab.optim.momenta import begin_momenta

            sgd.register_step_pre_hook(begin_momenta)
        return sgd
    if section.optimizer == "lars":
        from conadv_lab.optim.lars import LARS

        return LARS(
            groups,
            lr=section.lr,
            momentum=section.momentum,
            weight_decay=section.weight_decay,
            trust_coefficient=section.trust_coefficient,
            variant=section.lars_variant,
        )
    from conadv_lab.optim.lamb import LAMB

    return LAMB(groups, lr=section.lr, weight_decay=section.weight_decay)


def _all_on_gpu(groups: list) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def build_schedule(config: Config, stream: Stream) -> Schedule:
    section = config.optimization
    assert section.lr is not None, "the config is not resolved"

    warmup = stream.steps_of(section.warmup_epochs) if section.warmup_steps is None else section.warmup_steps
    if warmup > stream.steps:
        name = "warmup_epochs" if section.warmup_steps is None else "warmup_steps"
        raise ValueError(
            f"{name} is {getattr(section, name):g}, {warmup} steps; allowed: at most the run's {stream.steps}"
        )
    return Schedule(
        lr=section.lr,
        steps=stream.steps,
        warmup=warmup,
        decay=section.schedule,
        end=section.end_lr,
        power=section.power,
        milestones=tuple(stream.steps_of(epochs) for epochs in section.milestone_epochs),
        factor=section.decay_factor,
    )
