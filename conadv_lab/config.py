"""The whole configuration of a run: a small dataclass of each room, plain values only, no torch.

On the command line the sections' fields are options of one flat list (``--lr``, ``--epsilon``), so their names
are unique. A None is filled in by `resolved`, and the filled-in value is what a run folder records.
"""

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab import methods
from conadv_lab.data.options import Data, Demand
from conadv_lab.methods import METHODS, method_of
from conadv_lab.mistakes import ABOVE_0, COUNT, COUNT_OR_0, require, require_ranges, unknown
from conadv_lab.models.options import GRAPH_MODES, Model
from conadv_lab.optim.options import SCHEDULES, Optimization
from conadv_lab.optim.schedule import scaled_lr
from conadv_lab.references import is_file_reference


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
class Training:
    """Length, batch size, evaluation and logging."""

    epochs: float = 20.0
    """Passes over the training set as clean images."""
    steps: int | None = None
    """Number of steps, in place of epochs."""
    global_batch: int = 256
    """Clean images per step; equal-cost forms take half of them clean and half altered."""
    micro_batch: int | None = None
    """Clean images per forward pass, also batch norm's ghost batch; None: all clean images of a step."""
    batch_norm: Literal["ghost", "sync"] = "ghost"
    """How ranks share a step: whole micro-batches each, or a slice of every one, its statistics synchronised."""
    seed: int = 0
    """Decides initial weights, order, augmentation and random starts."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads of torch; results are bitwise equal for equal numbers. None: all cores that this
    process may use."""
    deterministic: bool = False
    """Use deterministic algorithms on CUDA (slower)."""
    capture: Literal["auto", "on", "off"] = "auto"
    """A whole step as one CUDA graph: auto where a rank has few micro-batches and it can be, on refuses where it
    cannot."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always has one."""
    evaluate_every: int = 0
    """Steps between evaluations on the test set; 0: only at the end."""
    bn_recalibrate: int = 10_000
    """Training images, augmented as in training, on which batch norm's main statistics are re-estimated before an
    evaluation; 0 keeps the running averages."""
    mirror: bool = False
    """Also report test accuracy with mirror averaging: logits averaged over each image and its mirror image."""
    pgd_images: int = 0
    """Test images for PGD accuracy at each evaluation, within epsilon; 0 for none."""
    pgd_steps: int = 10
    """k: steps of the PGD attack, each 2.5 epsilon/k long, from a random start."""
    log_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Where metrics go besides the run folder; a logger that fails is dropped with a warning."""
    probe_every: int = 0
    """Steps between two measurements of the sign agreement of stale and fresh attacks; 0 for none."""

    def check(self) -> None:
        """Raise ``ValueError`` at the first value that cannot work."""
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
_HOMES = {field.name: name for name, kind in _SECTIONS.items() for field in dataclasses.fields(kind)}
"""The section of each field."""


def new_batch(config: Config) -> int:
    """Images that a step takes from the stream: the global batch, or another share of it that the method states."""
    return round(config.training.global_batch * method_of(config).new_fraction)


def demand_of(config: Config) -> Demand:
    """What the run wants of its data."""
    training, method, batch = config.training, method_of(config), new_batch(config)
    micro_batch = round((training.micro_batch or batch) * max(1, method.new_fraction))
    return Demand(training.seed, training.global_batch, min(micro_batch, batch), method.rereads)


def resolved(config: Config) -> Config:
    """The config with every None that does not depend on machine or data filled in; checked.

    Raises:
        ValueError: an impossible value or combination.
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
        filled |= {"lr_rule": "none", "warmup_epochs": 0.0, "warmup_steps": None}  # on record is what happens
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
    name, model = config.method.method, config.model
    if name not in METHODS and not is_file_reference(name):
        raise unknown("method", name, METHODS)
    for section in (config.data, model, config.optimization, config.training):
        section.check()
    for part in methods.options():
        part.check(config.method)
    if config.optimization.optimizer == "adamp" and model.channels_last:
        raise ValueError(
            "channels_last is True; allowed with optimizer 'adamp': False, as it takes a weight's rows as they lie"
        )
    if model.compile_mode in GRAPH_MODES and config.method.placement == "stream":
        raise ValueError(
            f"compile_mode is {model.compile_mode!r}; allowed with placement 'stream': 'default' or "
            "'max-autotune-no-cudagraphs', as the network's graphs are replayed on one stream"
        )
    if not is_file_reference(name):
        check_method(config, method_of(config))


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
    if placement == "ranks" and not (method.concurrent and method.staleness and method.side == "attack"):
        name = f"{name} with staleness 0" if method.concurrent else name
        able = ", ".join(
            f"{name}'s" for name, kind in METHODS.items() if kind.concurrent and kind.side == "attack"
        )
        raise ValueError(
            f"placement is {placement!r}; allowed for {name}: 'serial' or 'stream', as only an attack that its own "
            f"step does not wait for, {able} with a staleness of at least 1, can run on other ranks"
        )
    method.check(config)
    if (placement == "ranks") != (section.attackers > 0):
        allowed = "at least 1" if placement == "ranks" else "0"
        raise ValueError(f"attackers is {section.attackers}; allowed with placement {placement!r}: {allowed}")


def methods_table() -> str:
    """All methods with their defaults as a table in Markdown."""
    lines = ["| `--method` | a step trains on | cost | depth | source |", "|---|---|---|---|---|"]
    for name in METHODS:
        method = method_of(Config().replace(method=name))
        cost = Fraction(method.gradient_evaluations).limit_denominator(100)
        lines.append(f"| `{name}` | {method.about} | {cost} | {method.depth} | {method.source} |")
    return "\n".join(lines)
