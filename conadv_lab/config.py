"""The whole configuration of a run: one small dataclass a room, plain values only, no torch.

On the command line the sections' fields are options of one flat list (``--lr``, ``--epsilon``), so their names
are unique. A None is filled in by `resolved`, and the filled-in value is what a run folder records.
"""

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab import methods
from conadv_lab.methods import METHODS, method_of
from conadv_lab.mistakes import require, unknown
from conadv_lab.optim.schedule import scaled_lr
from conadv_lab.references import is_file_reference

DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "synthetic")
MODELS = ("digits-cnn", "fast-cnn", "fast-cnn-small", "resnet18", "resnet20", "resnet50")
RESNETS = tuple(name for name in MODELS if name.startswith("resnet"))
OPTIMIZERS = ("sgd", "lars", "lamb")
GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Of torch.compile: those that replay the network from CUDA graphs."""
INFINITY = float("inf")


@dataclass(frozen=True)
class Data:
    """What is trained on."""

    dataset: str = "digits"
    """digits, cifar10, cifar100, imagenet, synthetic, or path/to/file.py:function."""
    data_dir: str = "data"
    """Folder of the CIFAR or ImageNet archives, of their unpacked layouts, or of packs."""
    download: bool = False
    """Fetch the official archive when it is not in data_dir."""
    train_images: int | None = None
    """Train on the first so many images of a fixed shuffle; None for all."""
    synthetic_images: int = 10_000
    """Size of the synthetic training set."""
    synthetic_pixels: int = 32
    """Height and width of synthetic images."""
    crop: int = 0
    """Padding in pixels of the random crop; 0 for none."""
    crop_padding: Literal["zeros", "reflect"] = "zeros"
    """What the random crop is padded with."""
    flip: bool = False
    """Random horizontal flip, p = 0.5."""
    flip_rule: Literal["random", "alternating"] = "random"
    """random draws a flip for each image and epoch; alternating flips each image in every second epoch."""
    cutout: int = 0
    """Side in pixels of the square that is blanked out; 0 for none."""
    pixels: int = 224
    """Side of imagenet's training images, cut out at random and resized."""
    crop_scale: float = 0.08
    """Smallest share of a photograph that a random crop takes (imagenet)."""
    eval_pixels: int = 224
    """Side of imagenet's images in evaluation, from the middle."""
    eval_resize: int | None = None
    """What the short side is brought to before that; None: eval_pixels · 256/224."""
    policy: Literal["none", "autoaugment", "randaugment"] = "none"
    """Policy after crop and flip (imagenet)."""
    mixup: float = 0.0
    """α of mixup's Beta distribution; 0 for none (imagenet)."""
    erasing: float = 0.0
    """Probability of random erasing (imagenet)."""
    reader: Literal["native", "dali"] = "native"
    """Who decodes and resizes imagenet: this package, or NVIDIA DALI (extra dali), on the GPU where the run is."""
    workers: int = 0
    """Processes, or threads of dali, that read imagenet; images are the same for any number."""
    keep_gb: float = 1.0
    """Memory of a process in GB for images that the method needs once more; without room they are read again."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    model: str = "digits-cnn"
    """digits-cnn, fast-cnn, fast-cnn-small, resnet18, resnet20, resnet50, timm:NAME, or path/to/file.py:function."""
    last_gamma: float = 0.0
    """γ that the last batch norm of each residual block begins with: 0 (Goyal et al. 2017), or 1 as in torchvision."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 is autocast, with weights in float32."""
    channels_last: bool = False
    """Memory layout NHWC, faster for convolutions on most devices."""
    compile: bool = False
    """torch.compile the network."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """torch.compile's own; reduce-overhead and max-autotune replay it from CUDA graphs, for few images a device."""
    ema: float = 0.0
    """Decay of an exponential average of the weights that is evaluated instead of them; 0 for none."""


@dataclass(frozen=True)
class _Method:
    method: str = "conadv"
    """One of those above, or path/to/file.py:function."""


if TYPE_CHECKING:
    Method = Any
else:
    _about = {"__doc__": f"How a step's gradient is made.\n\n{methods.described()}", "__module__": __name__}
    Method = make_dataclass(
        "Method", [], bases=(*reversed(methods.options()), _Method), frozen=True, namespace=_about
    )


@dataclass(frozen=True)
class Optimization:
    """Optimiser and learning-rate schedule."""

    optimizer: str = "sgd"
    """sgd, lars or lamb."""
    lr: float | None = None
    """Peak learning rate, after scaling; None: base_lr scaled by lr_rule from base_batch."""
    base_lr: float = 0.1
    """Learning rate at base_batch."""
    base_batch: int = 256
    """Global batch that base_lr is meant for."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate grows with the global batch."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    weight_decay: float = 5e-4
    """L2 decay, off batch norm and biases."""
    bias_lr_factor: float = 1.0
    """Learning rate of batch norm's biases, as a multiple of everything else's."""
    trust_coefficient: float = 0.001
    """η of lars."""
    lars_variant: Literal["A", "B", "C"] = "B"
    """Which public definition of lars."""
    schedule: Literal["cosine", "polynomial", "step", "constant"] = "cosine"
    """Decay after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, in place of warmup_epochs."""
    end_lr: float = 0.0
    """Learning rate at the end of cosine and polynomial decay."""
    power: float = 2.0
    """Power of polynomial decay."""
    milestone_epochs: tuple[float, ...] = ()
    """Epochs at which step decay multiplies by decay_factor."""
    decay_factor: float = 0.1
    """Factor of step decay."""
    label_smoothing: float = 0.0
    """Label smoothing of the training criterion, which the attack uses too."""


@dataclass(frozen=True)
class Training:
    """Length, batch, and what is written down."""

    epochs: float = 20.0
    """Passes over the training set as clean images."""
    steps: int | None = None
    """Number of steps, in place of epochs."""
    global_batch: int = 256
    """Images of a step; the clean ones, but for equal-cost forms, which take half clean and half altered."""
    micro_batch: int | None = None
    """Clean images of one forward, and the ghost batch of batch norm; None: all clean images of a step."""
    batch_norm: Literal["ghost", "sync"] = "ghost"
    """How ranks share a step: whole micro-batches each, or a slice of every one, its statistics synchronised."""
    seed: int = 0
    """Decides initial weights, order, augmentation and random starts."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; results are bitwise equal for equal numbers. None: all cores that this
    process may use."""
    deterministic: bool = False
    """Deterministic algorithms on CUDA, slower."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; the last step always has one."""
    evaluate_every: int = 0
    """Steps between two evaluations on the test set; 0: at the end alone."""
    bn_recalibrate: int = 10_000
    """Training images, augmented as in training, on which batch norm's main statistics are re-estimated before an
    evaluation; 0 keeps the running averages."""
    mirror: bool = False
    """Also report test accuracy with mirror averaging: logits averaged over each image and its mirror image."""
    pgd_images: int = 0
    """Test images of a PGD accuracy at each evaluation, in the ball of epsilon; 0 for none."""
    pgd_steps: int = 10
    """k: steps of that attack, each of 2.5 epsilon/k, from a random start."""
    probe_every: int = 0
    """Steps between two measurements of the sign agreement of stale and fresh attacks; 0 for none."""


@dataclass(frozen=True)
class Config:
    """All of a run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    optimization: Optimization = field(default_factory=Optimization)
    training: Training = field(default_factory=Training)

    def replace(self, **fields: Any) -> "Config":
        """A copy with other values, each named as on the command line.

        >>> Config().replace(lr=0.2, method="disadv").optimization.lr
        0.2
        """
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        homes = {name: section for section, values in sections.items() for name in values}
        for name, value in fields.items():
            if name not in homes:
                raise unknown("field", name, homes)
            sections[homes[name]][name] = value
        return Config.from_dict(sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(sections: dict[str, dict[str, Any]]) -> "Config":
        """The config that `to_dict` described, also after a trip through JSON."""
        built = {}
        for name, kind in _SECTIONS.items():
            values = dict(sections.get(name, {}))
            allowed = {f.name for f in dataclasses.fields(kind)}
            for key in values:
                if key not in allowed:
                    raise unknown(f"field of the config's section {name!r}", key, allowed)
            # JSON has lists where the dataclasses have tuples.
            built[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return Config(**built)


_SECTIONS: dict[str, type] = {
    "data": Data,
    "model": Model,
    "method": Method,
    "optimization": Optimization,
    "training": Training,
}


def new_batch(config: Config) -> int:
    """Images that a step takes from the stream: the global batch, or another share of it that the method states."""
    return round(config.training.global_batch * method_of(config).new_fraction)


def resolved(config: Config) -> Config:
    """The config with every None that does not depend on machine or data filled in; checked.

    Raises:
        ValueError: an impossible value or combination.
    """
    check(config)
    optimization, method, training = config.optimization, config.method, config.training
    filled: dict[str, Any] = {}
    scaled = scaled_lr(
        optimization.base_lr, training.global_batch, optimization.base_batch, optimization.lr_rule
    )
    if optimization.lr is None:
        filled["lr"] = scaled
    elif optimization.lr != scaled:
        filled["lr_rule"] = "none"  # the rule did not make this learning rate, so it is not on record
    if method.weights is None:
        own = is_file_reference(method.method)  # which takes a config that is filled in
        halves = optimization.optimizer == "sgd" or (not own and method_of(config).new_fraction < 1)
        filled["weights"] = (0.5, 0.5) if halves else (1.0, 1.0)
    return methods.filled(config).replace(**filled)


def check(config: Config) -> None:
    """Raise ``ValueError`` at the first value or combination that cannot work."""
    _check_names(config)
    _check_numbers(config)
    for part in methods.options():
        part.check(config.method)
    _check_combinations(config)
    if not is_file_reference(config.method.method):
        check_method(config, method_of(config))


def _check_names(config: Config) -> None:
    for what, value, allowed in (
        ("dataset", config.data.dataset, DATASETS),
        ("model", config.model.model, MODELS),
        ("method", config.method.method, METHODS),
        ("optimizer", config.optimization.optimizer, OPTIMIZERS),
    ):
        own = what != "optimizer" and is_file_reference(value)
        own |= what == "model" and value.startswith("timm:")
        if value not in allowed and not own:
            raise unknown(what, value, allowed)


def _check_numbers(config: Config) -> None:
    whole_from_1 = "a whole number of at least 1"
    whole_from_0 = "a whole number of at least 0"
    data, model = config.data, config.model
    optimization, training = config.optimization, config.training
    for name, value, fine, allowed in (
        ("train_images", data.train_images, data.train_images is None or data.train_images >= 1, whole_from_1),
        ("synthetic_images", data.synthetic_images, data.synthetic_images >= 1, whole_from_1),
        ("synthetic_pixels", data.synthetic_pixels, data.synthetic_pixels >= 1, whole_from_1),
        ("crop", data.crop, data.crop >= 0, whole_from_0),
        ("cutout", data.cutout, data.cutout >= 0, whole_from_0),
        ("pixels", data.pixels, data.pixels >= 1, whole_from_1),
        ("crop_scale", data.crop_scale, 0 < data.crop_scale <= 1, "above 0, up to 1"),
        ("eval_pixels", data.eval_pixels, data.eval_pixels >= 1, whole_from_1),
        ("eval_resize", data.eval_resize, data.eval_resize is None or data.eval_resize >= data.eval_pixels,
         f"at least eval_pixels, {data.eval_pixels}"),
        ("mixup", data.mixup, 0 <= data.mixup < INFINITY, "at least 0"),
        ("erasing", data.erasing, 0 <= data.erasing <= 1, "0 to 1"),
        ("workers", data.workers, data.workers >= 0, whole_from_0),
        ("keep_gb", data.keep_gb, 0 <= data.keep_gb < INFINITY, "at least 0"),
        ("ema", model.ema, 0 <= model.ema < 1, "at least 0 and below 1"),
        ("last_gamma", model.last_gamma, 0 <= model.last_gamma < INFINITY, "at least 0"),
        ("lr", optimization.lr, optimization.lr is None or 0 <= optimization.lr < INFINITY, "at least 0"),
        ("base_lr", optimization.base_lr, 0 <= optimization.base_lr < INFINITY, "at least 0"),
        ("base_batch", optimization.base_batch, optimization.base_batch >= 1, whole_from_1),
        ("momentum", optimization.momentum, 0 <= optimization.momentum < 1, "at least 0 and below 1"),
        ("weight_decay", optimization.weight_decay, 0 <= optimization.weight_decay < INFINITY, "at least 0"),
        ("bias_lr_factor", optimization.bias_lr_factor, 0 <= optimization.bias_lr_factor < INFINITY, "at least 0"),
        ("trust_coefficient", optimization.trust_coefficient, 0 < optimization.trust_coefficient < INFINITY, "above 0"),
        ("warmup_epochs", optimization.warmup_epochs, 0 <= optimization.warmup_epochs < INFINITY, "at least 0"),
        ("warmup_steps", optimization.warmup_steps, (optimization.warmup_steps or 0) >= 0, whole_from_0),
        ("milestone_epochs", optimization.milestone_epochs,
         all(0 <= epoch < INFINITY for epoch in optimization.milestone_epochs), "epochs of at least 0"),
        ("end_lr", optimization.end_lr, 0 <= optimization.end_lr < INFINITY, "at least 0"),
        ("power", optimization.power, 0 < optimization.power < INFINITY, "above 0"),
        ("label_smoothing", optimization.label_smoothing, 0 <= optimization.label_smoothing < 1, "0 up to below 1"),
        ("epochs", training.epochs, 0 < training.epochs < INFINITY, "above 0"),
        ("steps", training.steps, training.steps is None or training.steps >= 1, whole_from_1),
        ("global_batch", training.global_batch, training.global_batch >= 1, whole_from_1),
        ("micro_batch", training.micro_batch, (training.micro_batch or 1) >= 1 and training.micro_batch != 0,
         whole_from_1),
        ("seed", training.seed, training.seed >= 0, whole_from_0),
        ("threads", training.threads, training.threads is None or training.threads >= 1, whole_from_1),
        ("log_every", training.log_every, training.log_every >= 1, whole_from_1),
        ("checkpoint_every", training.checkpoint_every, training.checkpoint_every >= 1, whole_from_1),
        ("evaluate_every", training.evaluate_every, training.evaluate_every >= 0, whole_from_0),
        ("bn_recalibrate", training.bn_recalibrate, training.bn_recalibrate >= 0, whole_from_0),
        ("pgd_images", training.pgd_images, training.pgd_images >= 0, whole_from_0),
        ("pgd_steps", training.pgd_steps, training.pgd_steps >= 1, whole_from_1),
        ("probe_every", training.probe_every, training.probe_every >= 0, whole_from_0),
    ):  # fmt: skip
        require(fine, name, value, allowed)


def _check_augmentation(data: Data) -> None:
    photographs = data.dataset == "imagenet"
    resident = ("crop", "crop_padding", "flip_rule", "cutout")
    for name, idle in (
        ("crop", 0), ("crop_padding", "zeros"), ("flip_rule", "random"), ("cutout", 0),
        ("policy", "none"), ("mixup", 0.0), ("erasing", 0.0), ("reader", "native"),
    ):  # fmt: skip
        value = getattr(data, name)
        if value != idle and photographs == (name in resident):
            raise ValueError(f"{name} is {value!r}; allowed with dataset {data.dataset}: {idle!r}")
    if data.flip_rule != "random" and not data.flip:
        raise ValueError(f"flip_rule is {data.flip_rule!r}; allowed without flip: 'random'")
    if data.reader == "dali" and data.policy != "none":
        raise ValueError(
            f"policy is {data.policy!r}; allowed with reader 'dali': 'none', as DALI draws policies its own way; "
            "reader 'native' has them"
        )


def _check_combinations(config: Config) -> None:
    _check_augmentation(config.data)
    optimization = config.optimization
    _check_compiling(config)
    if config.model.last_gamma != 0 and config.model.model not in RESNETS:
        raise ValueError(
            f"last_gamma is {config.model.last_gamma:g}; allowed for model {config.model.model}: 0, as only the "
            "built-in resnets have it"
        )
    if optimization.nesterov and (optimization.optimizer != "sgd" or optimization.momentum == 0):
        raise ValueError("nesterov is True; allowed: with optimizer sgd and a momentum above 0 only")


def _check_compiling(config: Config) -> None:
    mode = config.model.compile_mode
    if mode != "default" and not config.model.compile:
        raise ValueError(f"compile_mode is {mode!r}; allowed without compile: 'default'")
    if mode in GRAPH_MODES and config.method.placement == "stream":
        raise ValueError(
            f"compile_mode is {mode!r}; allowed with placement 'stream': 'default' or 'max-autotune-no-cudagraphs', "
            "as the attack beside the step is captured in a CUDA graph of its own"
        )


def check_method(config: Config, method: methods.Method) -> None:
    """Raise ``ValueError`` where batch or placement do not suit the method, a built-in one or a user's own."""
    section, batch, micro_batch = config.method, config.training.global_batch, config.training.micro_batch
    name, placement, clean = section.method, section.placement, round(batch * min(1, method.new_fraction))
    if method.new_fraction == 0.5 and batch % 2:
        raise ValueError(
            f"global_batch is {batch}; allowed for {name}: an even number, half clean and half altered images"
        )
    if method.new_fraction > 1:
        one_of = round(1 / (method.new_fraction - 1))
        for what, value in (("global_batch", batch), ("micro_batch", micro_batch or batch)):
            allowed = f"for {name}: a multiple of {one_of}, as one other image comes with {one_of} clean ones"
            require(value % one_of == 0, what, value, allowed)
    if micro_batch is not None and micro_batch > clean:
        raise ValueError(
            f"micro_batch is {micro_batch}; allowed: at most {clean}, the clean images of a step"
        )
    if placement != "serial" and not (method.concurrent and method.staleness):
        name = f"{name} with staleness 0" if method.concurrent else name
        able = ", ".join(f"{name}'s" for name, kind in METHODS.items() if kind.concurrent)
        raise ValueError(
            f"placement is {placement!r}; allowed for {name}: 'serial', as only an attack that its own step "
            f"does not wait for, {able} with a staleness of at least 1, can run beside a step"
        )
    if (placement == "ranks") != (section.attackers > 0):
        allowed = "at least 1" if placement == "ranks" else "0"
        raise ValueError(f"attackers is {section.attackers}; allowed with placement {placement!r}: {allowed}")
