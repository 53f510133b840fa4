"""The whole configuration of a run: one small dataclass per section, plain values only, no torch.

On the command line the fields of all sections form one flat list of options (``--lr``, ``--epsilon``), so their names
are unique. `resolved` fills in None, and a run folder records the filled-in value.
"""

import dataclasses
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab import methods
from conadv_lab.data.options import Data, Demand
from conadv_lab.displays import markdown
from conadv_lab.methods import METHODS, method_of
from conadv_lab.mistakes import ABOVE_0, COUNT, COUNT_OR_0, require, require_ranges, unknown
from conadv_lab.models.options import GRAPH_MODES, Model
from conadv_lab.optim.options import OPTIMIZERS, SCHEDULES, Optimization
from conadv_lab.optim.schedule import scaled_lr
from conadv_lab.reading import require_kind
from conadv_lab.references import is_file_reference


@dataclass(frozen=True)
class _Method:
    method: str = "conadv"
    """One of the names above, or path/to/file.py:function."""


if TYPE_CHECKING:
    Method = Any
else:
    _told = (
        "How a step's gradient is made; train --list methods also lists the options that each method reads."
    )
    _about = {"__doc__": f"{_told}\n\n{methods.described()}", "__module__": __name__}
    Method = make_dataclass(
        "Method", [], bases=(*reversed(methods.options()), _Method), frozen=True, namespace=_about
    )


@dataclass(frozen=True)
class Training:
    """Length, batch size, evaluation and logging."""

    epochs: float = 20.0
    """Epochs over the training set, counted in clean images."""
    steps: int | None = None
    """Number of steps, instead of epochs."""
    global_batch: int = 256
    """Clean images per step; in equal-cost forms half are clean and half are altered."""
    micro_batch: int | None = None
    """Clean images per forward pass, also the ghost batch of batch norm; None: all clean images of a step."""
    batch_norm: Literal["ghost", "sync"] = "ghost"
    """How ranks share a step: whole micro-batches each, or a slice of every one with synchronised statistics."""
    seed: int = 0
    """Seed of initial weights, data order, augmentation and random starts."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto uses a GPU if there is one."""
    threads: int | None = None
    """CPU threads; the number may change bits. None: all cores available to this process."""
    deterministic: bool = False
    """Use deterministic algorithms on CUDA (slower)."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Capture whole steps as CUDA graphs; auto: if possible with few micro-batches per rank; on: fail if impossible."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    evaluate_every: int = 0
    """Steps between evaluations on the test set; 0: only at the end."""
    bn_recalibrate: int = 10_000
    """Augmented training images for re-estimating batch norm's main statistics; 0: use the running averages."""
    mirror: bool = False
    """Also report test accuracy with logits averaged over each image and its horizontal flip."""
    pgd_images: int = 0
    """Test images for PGD accuracy (within epsilon) at each evaluation; 0 for none."""
    pgd_steps: int = 10
    """Steps k of the PGD attack, each of size 2.5 epsilon/k, from a random start."""
    log_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Logger that also gets the metrics; one that fails is dropped with a warning."""
    probe_every: int = 0
    """Steps between measurements of the sign agreement of stale and fresh attacks; 0 for none."""

    def check(self) -> None:
        """Raise ``ValueError`` at the first invalid value."""
        require_ranges(
            self,
            epochs=ABOVE_0,
            steps=COUNT,
            global_batch=COUNT,
            micro_batch=COUNT,
            seed=COUNT_OR_0,
            threads=COUNT,
            log_every=COUNT,
            checkpoint_every=COUNT,
            evaluate_every=COUNT_OR_0,
            bn_recalibrate=COUNT_OR_0,
            pgd_images=COUNT_OR_0,
            pgd_steps=COUNT,
            probe_every=COUNT_OR_0,
        )


@dataclass(frozen=True)
class Config:
    """A run's configuration."""

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
        changed: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            if name not in _HOMES:
                raise unknown("field", name, _HOMES)
            changed.setdefault(_HOMES[name], {})[name] = tuple(value) if isinstance(value, list) else value
        sections = {
            name: dataclasses.replace(getattr(self, name), **values) for name, values in changed.items()
        }
        return dataclasses.replace(self, **sections)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(sections: dict[str, dict[str, Any]]) -> "Config":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        built = {}
        for name, kind in _SECTIONS.items():
            values = dict(sections.get(name, {}))
            known = {f.name for f in dataclasses.fields(kind)}
            for key in values:
                if key not in known:
                    raise unknown(f"field of the config's section {name!r}", key, known)
            # JSON turns tuples into lists.
            built[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return Config(**built)


@cache
def _kinds() -> dict[str, dict[str, Any]]:
    """Each section's fields and their types."""
    return {name: typing.get_type_hints(kind) for name, kind in _SECTIONS.items()}


_SECTIONS: dict[str, type] = {
    "data": Data,
    "model": Model,
    "method": Method,
    "optimization": Optimization,
    "training": Training,
}
_HOMES = {field.name: name for name, kind in _SECTIONS.items() for field in dataclasses.fields(kind)}
"""Maps each field to its section."""


def new_batch(config: Config) -> int:
    """Images that a step takes from the stream: the global batch, or the method's fraction of it."""
    return round(config.training.global_batch * method_of(config).new_fraction)


def demand_of(config: Config) -> Demand:
    """What the run needs from its data."""
    training, method, batch = config.training, method_of(config), new_batch(config)
    micro_batch = round((training.micro_batch or batch) * max(1, method.new_fraction))
    return Demand(training.seed, training.global_batch, min(micro_batch, batch), method.rereads)


def resolved(config: Config) -> Config:
    """A checked config, with every None filled in that does not depend on machine or data.

    Raises:
        ValueError: an invalid value or combination.
    """
    check(config)
    optimization, method, training = config.optimization, config.method, config.training
    filled: dict[str, Any] = {}
    ceiling = SCHEDULES[optimization.schedule].ceiling
    scaled = scaled_lr(
        optimization.base_lr, training.global_batch, optimization.base_batch, optimization.lr_rule
    )
    if ceiling is not None:
        scaled = ceiling
        filled |= {"lr_rule": "none", "warmup_epochs": 0.0, "warmup_steps": None}  # record what happens
    if optimization.lr is None:
        filled["lr"] = scaled
    elif optimization.lr != scaled:
        filled["lr_rule"] = "none"  # the rule did not set this learning rate, so do not record it
    if method.weights is None:
        own = is_file_reference(method.method)  # a user's method takes a filled-in config
        halves = optimization.optimizer == "sgd" or (not own and method_of(config).new_fraction < 1)
        filled["weights"] = (0.5, 0.5) if halves else (1.0, 1.0)
    return methods.filled(config).replace(**filled)


def check(config: Config) -> None:
    """Raise ``ValueError`` at the first invalid value or combination."""
    name, model = config.method.method, config.model
    for section_name, kinds in _kinds().items():
        for one, kind in kinds.items():
            value = getattr(getattr(config, section_name), one)
            require_kind(one, value, kind)
    if name not in METHODS and not is_file_reference(name):
        raise unknown("method", name, METHODS)
    for section in (config.data, model, config.optimization, config.training):
        section.check()
    for part in methods.options():
        part.check(config.method)
    if config.optimization.optimizer == "adamp" and model.channels_last:
        raise ValueError(
            "channels_last is True; allowed with optimizer 'adamp': False, as it assumes contiguous weights"
        )
    if model.compile_mode in GRAPH_MODES and config.method.placement == "stream":
        raise ValueError(
            f"compile_mode is {model.compile_mode!r}; allowed with placement 'stream': 'default' or "
            "'max-autotune-no-cudagraphs', as CUDA graphs of the network replay on one stream"
        )
    if config.training.capture == "on" and config.method.placement == "ranks":
        raise ValueError(
            "capture is 'on'; allowed with placement 'ranks': 'auto' or 'off', as the attack runs on other ranks"
        )
    if not is_file_reference(name):
        check_method(config, method_of(config))


def tell_without_effect(config: Config, words: Sequence[str]) -> None:
    """Warn of each option among command-line words that has no effect beside the config's other options."""
    given = {
        word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for word in words
        if word.startswith("--")
    }
    for what, chosen, own, every in _read_by(config):
        for name in sorted(given & every - own):
            reads = ", ".join(map(_option, sorted(own))) or "none of its own"
            warnings.warn(f"{_option(name)} has no effect with {what} {chosen!r}, whose options are: {reads}")
    for name, instead in (("epochs", "steps"), ("warmup_epochs", "warmup_steps"), ("base_lr", "lr")):
        if {name, instead} <= given:
            warnings.warn(f"{_option(name)} has no effect beside {_option(instead)}, which replaces it")


def _read_by(config: Config) -> Iterator[tuple[str, str, set[str], set[str]]]:
    """What is chosen by name: its kind, the name, the options that it reads, and those that any of its kind reads."""
    name, every = (
        config.method.method,
        {field for kind in METHODS.values() for field in methods.fields_of(kind)},
    )
    if name in METHODS:
        own = {field for kind in METHODS[name].parts(config) for field in methods.fields_of(kind)}
        evaluation = {"epsilon", "norm"} if config.training.pgd_images else set()
        yield "method", name, own | evaluation, every
    for what, entries in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
        chosen = getattr(config.optimization, what)
        every = {name for entry in entries.values() for name in entry.reads}
        yield what, chosen, set(entries[chosen].reads), every


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def check_method(config: Config, method: methods.Method) -> None:
    """Raise ``ValueError`` if batch or placement do not suit the method, built-in or a user's."""
    section, batch, micro_batch = config.method, config.training.global_batch, config.training.micro_batch
    name, placement, clean = section.method, section.placement, round(batch * min(1, method.new_fraction))
    if method.new_fraction == 0.5 and batch % 2:
        raise ValueError(
            f"global_batch is {batch}; allowed for {name}: an even number, half clean and half altered images"
        )
    if method.new_fraction > 1:
        one_of = round(1 / (method.new_fraction - 1))
        for what, value in (("global_batch", batch), ("micro_batch", micro_batch or batch)):
            able = f"for {name}: a multiple of {one_of}, as it adds one image per {one_of} clean ones"
            require(value % one_of == 0, what, value, able)
    if micro_batch is not None and micro_batch > clean:
        raise ValueError(
            f"micro_batch is {micro_batch}; allowed: at most {clean}, the clean images of a step"
        )
    if placement == "ranks" and not (method.concurrent and method.staleness and method.side == "attack"):
        name = f"{name} with staleness 0" if method.concurrent else name
        able = ", ".join(
            f"{name}'s" for name, kind in METHODS.items() if kind.concurrent and kind.side == "attack"
        )
        raise ValueError(
            f"placement is {placement!r}; allowed for {name}: 'serial' or 'stream', as only a stale attack "
            f"({able} with staleness at least 1) can run on other ranks"
        )
    method.check(config)
    if (placement == "ranks") != (section.attackers > 0):
        able = "at least 1" if placement == "ranks" else "0"
        raise ValueError(f"attackers is {section.attackers}; allowed with placement {placement!r}: {able}")


def methods_table() -> str:
    """A Markdown table of all methods with their defaults."""
    lines = []
    for name in METHODS:
        method = method_of(Config().replace(method=name))
        cost = Fraction(method.gradient_evaluations).limit_denominator(100)
        about = method.about.replace("|", r"\|")
        lines.append([f"`{name}`", about, cost, method.depth, method.source])
    return markdown(["`--method`", "a step trains on", "cost", "depth", "source"], lines)
