"""From a config to the objects of a run. All mistakes are found here, before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conadv_lab.config import Config, check_method, demand_of
from conadv_lab.criteria import logits
from conadv_lab.data.loader import ImageSet, Split, Stream, as_float
from conadv_lab.data.sets import load_sets
from conadv_lab.data.streams import augmentation, stream_over
from conadv_lab.methods import method_of
from conadv_lab.methods.base import Method
from conadv_lab.methods.families.conadv import ConAdv, Placement
from conadv_lab.methods.lanes import Streams
from conadv_lab.methods.placement import Attacker, OtherRanks
from conadv_lab.models.build import build_model
from conadv_lab.models.fast import WHITENING_IMAGES, FastCNN
from conadv_lab.models.norm import share_statistics
from conadv_lab.optim.autowu import AutoWU
from conadv_lab.optim.clipping import clip_before_steps
from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.options import OPTIMIZERS, SCHEDULES, Optimization
from conadv_lab.optim.schedule import Schedule
from conadv_lab.seeds import generator
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
    schedule: Schedule | AutoWU
    criterion: nn.Module
    stream: Stream
    ranks: Ranks = ALONE

    def calibration(self, part: slice = slice(None)) -> Iterator[Tensor]:
        """The augmented training images on which the main statistics are re-estimated, (n, C, H, W).

        The images are always the same; each is augmented as in an epoch of the run that the seed picks.

        Args:
            part: which of the groups to make; all by default.
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
        # Equal groups, since a small last one would weigh as much as a full one in the average.
        groups = max(1, round(count / EVALUATION_BATCH))
        return (
            list(zip(epochs.tensor_split(groups), chosen.tensor_split(groups), strict=True)) if count else []
        )


def build(config: Config, ranks: Ranks = ALONE) -> Parts:
    """All objects of a resolved config, the model with initial weights; also sets up the process.

    Raises:
        ValueError: anything that the config asks for and is not possible.
    """
    with ranks.agreed():  # a rank that failed alone would leave the others waiting in first_goes_first
        device = pick_device(config.training.device, ranks)
    settle(config, ranks, device)
    return assemble(config, device, ranks)


def assemble(config: Config, device: torch.device, ranks: Ranks = ALONE) -> Parts:
    """Like `build`, but changes no process-wide settings, for processes that only measure.

    Raises:
        ValueError: as for `build`.
    """
    with ranks.first_goes_first():
        train_set, test_set = load_sets(config.data, demand_of(config), device, config)
    model = build_model(config.model, train_set.classes, config.training.seed, config).to(device)
    require_fit(model, train_set, config)
    if isinstance(model, FastCNN):
        model.fit_whitening(
            as_float(train_set.fetch(torch.arange(min(WHITENING_IMAGES, len(train_set)), device="cpu"))[0])
        )
        # Take rank 0's: eigenvectors of another machine may differ in their last digits.
        ranks.take_from_first(model.whitening.weight)
    method = method_of(config)
    check_method(config, method)
    stream = build_stream(config, method, train_set, ranks)
    if config.method.placement == "stream":
        method.lanes = Streams(device)
    if config.method.placement == "ranks":
        if not isinstance(method, ConAdv):
            raise ValueError(
                f"placement is 'ranks'; allowed for {type(method).__name__}: 'serial' or 'stream'; only "
                "ConAdv and its subclasses can run their attack on other ranks"
            )
        method.placement = build_placement(config, stream, ranks)
    if ranks.trains and ranks.trainers > 1:
        share_statistics(model, ranks.training, spread=config.training.batch_norm == "sync")
    optimizer = build_optimizer(config.optimization, model)
    method.attach(optimizer)
    return Parts(
        config,
        device,
        train_set,
        test_set,
        model,
        method,
        optimizer,
        build_schedule(config.optimization, stream),
        nn.CrossEntropyLoss(label_smoothing=config.optimization.label_smoothing),
        stream,
        ranks,
    )


@torch.no_grad()
def require_fit(model: nn.Module, images: ImageSet, config: Config) -> None:
    """Raise ``ValueError`` if the augmentation or network cannot process the images."""
    two = torch.arange(2, device="cpu") % len(images)
    pixels = as_float(images.fetch(two)[0])
    augment = augmentation(config.data, images, config.training.seed, config.model.precision == "float64")
    if augment is not None:
        places = two.to(pixels.device)
        pixels = augment(pixels, torch.zeros_like(places), places)
    pixels = pixels.to(next(model.parameters()).dtype)
    model.eval()
    try:
        outputs = logits(model(pixels))
    except RuntimeError as error:
        raise ValueError(
            f"model {config.model.model} cannot process the images of {config.data.dataset}, "
            f"{tuple(pixels.shape[1:])} each: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train()
    if outputs.shape != (2, images.classes):
        raise ValueError(
            f"model {config.model.model} returns {tuple(outputs.shape)} for 2 images; allowed: (2, {images.classes}), "
            "one output per class"
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
        # If each rank sees only its own GPU, that is number 0.
        device = torch.device("cuda", ranks.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def build_stream(config: Config, method: Method, train_set: ImageSet, ranks: Ranks = ALONE) -> Stream:
    training = config.training
    split = Split(ranks.number, ranks.trainers, training.batch_norm == "sync")
    if not ranks.trains:  # attackers attack whole groups, whichever rank trains on them
        split = Split(ranks.number - ranks.trainers, ranks.attackers)
    batch = round(training.global_batch * method.new_fraction)
    steps = training.steps or max(1, round(training.epochs * len(train_set) * method.replays / batch))
    stream = stream_over(
        train_set,
        config.data,
        seed=training.seed,
        double=config.model.precision == "float64",
        batch=batch,
        first_batch=max(batch, training.global_batch),
        steps=steps,
        # Images beyond the global batch are added to each micro-batch's clean ones.
        micro_batch=round((training.micro_batch or batch) * max(1, method.new_fraction)),
        split=split,
        replays=method.replays,
    )
    for first, last in stream.own_spans(0):
        method.require_cut(last - first)
    return stream


def build_placement(config: Config, stream: Stream, ranks: Ranks) -> Placement:
    """This rank's side when ConAdv's attack has its own ranks."""
    if not ranks.trains:
        spread = config.training.batch_norm == "sync"
        trained = [Split(trainer, ranks.trainers, spread) for trainer in range(ranks.trainers)]
        return Attacker(stream, trained, ranks.weights)
    return OtherRanks(stream, ranks.trainers, ranks.attackers, ranks.weights, FIRST_PATIENCE)


def build_optimizer(section: Optimization, model: nn.Module) -> Optimizer:
    groups = parameter_groups(model, section.weight_decay, section.bias_lr_factor)
    optimizer = OPTIMIZERS[section.optimizer].load()(section, groups)
    if section.adaptive_clipping:
        clip_before_steps(optimizer, model, section.adaptive_clipping)
    return optimizer


def build_schedule(section: Optimization, stream: Stream) -> Schedule | AutoWU:
    return SCHEDULES[section.schedule].load()(section, stream)
