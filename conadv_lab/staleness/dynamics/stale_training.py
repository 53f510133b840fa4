"""One training run with given τ, and its measurements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from conadv_lab import sharpness
from conadv_lab.config import Config, resolved
from conadv_lab.methods import method_of
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.models.norm import plain_batch_norm
from conadv_lab.optim.groups import set_learning_rate
from conadv_lab.optim.options import SCHEDULES
from conadv_lab.optim.schedule import Schedule
from conadv_lab.staleness.draws import Draw, Taus
from conadv_lab.staleness.dynamics.frame import WHOLE
from conadv_lab.staleness.dynamics.probes import phase, probe
from conadv_lab.staleness.dynamics.snapshots import SnapshotConAdv
from conadv_lab.training.build import Parts, build
from conadv_lab.training.evaluate import calibrated_copy, evaluate, fixed_images
from conadv_lab.training.network import network_of
from conadv_lab.training.weights import average_of

PROBED = ("sign_agreement", "gain_ratio", "distance")
REPORTED = ("test_accuracy", "train_test_gap", "train_loss")


@dataclass(frozen=True)
class Job:
    """One run: its resolved config, the source of its τ, and the τ, (steps, workers)."""

    config: Config
    draw: Draw
    taus: Taus

    def __str__(self) -> str:
        return f"{self.draw.kind} τ = {self.draw.mean:g}, seed {self.config.training.seed}"


@dataclass
class Trained:
    """The result of a run.

    Attributes:
        model: for evaluation: the weight average, if configured.
        rows: of the probes, without the columns that identify the run.
        diverged_at: the step whose loss was NaN or infinite; None if the run finished.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    diverged_at: int | None = None


def jobs_of(config: Config, draws: Sequence[Draw], seeds: int) -> list[Job]:
    """All runs of a study, checked before the first one starts.

    Raises:
        ValueError: see `dynamics.study`.
    """
    _require_conadv(config)
    workers = max(draw.columns for draw in draws)
    training = config.training
    if training.micro_batch is None and workers > 1:
        config = config.replace(micro_batch=-(-training.global_batch // workers))
    config = resolved(config)
    stream = build(config).stream
    groups = -(-stream.batch // stream.micro_batch)
    if workers > groups:
        raise ValueError(
            f"workers is {workers}; allowed: 1 to {groups}, the micro-batches of a step "
            f"of {stream.batch} images by {stream.micro_batch}"
        )
    jobs = []
    for draw in draws:
        for seed in range(training.seed, training.seed + seeds):
            jobs.append(Job(config.replace(seed=seed), draw, draw.array(stream.steps, seed)))
    return jobs


def _require_conadv(config: Config) -> None:
    method, made = config.method, method_of(config)
    if not (isinstance(made, ConAdv) and made.concurrent):
        raise ValueError(
            f"method is {method.method!r}; allowed: conadv, as its attacks can be stale (--method conadv)"
        )
    if method.first != "initial":
        raise ValueError(
            f"first is {method.first!r}; allowed: 'initial', as each worker of a step has its own τ"
        )
    schedule = config.optimization.schedule
    if SCHEDULES[schedule].ceiling is not None:
        raise ValueError(
            f"schedule is {schedule!r}; allowed: one that is fixed before the run, as the runs of all τ share it"
        )
    if config.model.compile:
        raise ValueError(
            "compile is True; allowed: False, as old weights are loaded into a copy of the network"
        )


def run(job: Job, curvature_images: int = 256) -> list[dict[str, Any]]:
    """Train and measure: the rows of one run, without the columns that identify it."""
    parts = build(job.config)
    trained = train(parts, job.taus)
    steps = len(job.taus)
    lags = np.minimum(job.taus, np.arange(steps)[:, None])
    sums = np.cumsum([0.0, *(parts.schedule(number) for number in range(steps))])
    spans = sums[:steps, None] - sums[np.arange(steps)[:, None] - lags]
    about = {
        "step": steps, "phase": WHOLE, "worker": float("nan"),
        "effective_tau": float(lags.mean()), "tau_lr": float(spans.mean()),
    }  # fmt: skip
    if trained.diverged_at is not None:
        figures: dict[str, float] = {"diverged_at": trained.diverged_at}
    else:
        figures = measured(parts, trained.model, curvature_images)
    return trained.rows + [about | {"measure": name, "value": value} for name, value in figures.items()]


def train(parts: Parts, taus: Taus) -> Trained:
    """Train with these τ; for constant τ the parameters are bitwise those of the same run with ConAdv.

    Args:
        parts: of a resolved config of ConAdv, freshly built; its model is trained.
        taus: (steps, workers).
    """
    config, stream = parts.config, parts.stream
    assert isinstance(parts.method, ConAdv)
    parts.method = method = SnapshotConAdv(parts.method.attack, taus, parts.method.weights)
    network = network_of(parts.model, config.model, parts.device)
    average = average_of(parts.model, config.model.ema)
    assert isinstance(parts.schedule, Schedule)
    warmup, every = parts.schedule.warmup, config.training.probe_every
    rows: list[dict[str, Any]] = []
    lrs: list[float] = []
    for number in range(stream.steps):
        step = stream.step(number)
        lr = parts.schedule(number)
        set_learning_rate(parts.optimizer, lr)
        if every and number % every == 0:
            now = {"step": number, "phase": phase(number, warmup, stream.steps)}
            rows += _long(now, probe(method, network, step, parts.criterion, lrs))
        losses = method.backward(network, step, parts.criterion)
        if not math.isfinite(float(losses.clean) + float(losses.adversarial or 0)):
            return Trained(parts.model, rows, number)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        if average is not None:
            average.update_parameters(parts.model)
        lrs.append(lr)
    return Trained(parts.model if average is None else average.module, rows)


def _long(about: dict[str, Any], probed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per value."""
    rows = []
    for found in probed:
        values = {name: found.pop(name) for name in PROBED}
        rows += [about | found | {"measure": name, "value": value} for name, value in values.items()]
    return rows


def measured(parts: Parts, model: nn.Module, curvature_images: int) -> dict[str, float]:
    """Final metrics of a run: accuracy as in a normal run, and the top eigenvalue of the training loss."""
    judged = calibrated_copy(parts, model)
    figures = evaluate(parts, judged)
    found = {name: figures[name] for name in REPORTED}
    lr = parts.config.optimization.lr
    if curvature_images and lr is not None:
        batch = fixed_images(parts.train_set, curvature_images)
        facts = {"split": "train", "augmentation": "none", "learning_rate": lr}
        report = sharpness.measure(
            plain_batch_norm(judged), parts.criterion, [batch], measures=("top_eigenvalue",), facts=facts
        )
        found["top_eigenvalue"] = report["top_eigenvalue"].value
        found["lr_times_eigenvalue"] = lr * found["top_eigenvalue"]
    return found
