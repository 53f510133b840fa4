"""One training run, from a config to a finished run folder; it can be stopped and resumed at any time."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from conadv_lab.capture.choice import backend_of, reason_against, slower, synchronised
from conadv_lab.capture.feed import Copies, Feed
from conadv_lab.capture.program import Program
from conadv_lab.capture.replays import Backend
from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Step
from conadv_lab.files import write_json
from conadv_lab.methods.base import Losses
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.placement import OtherRanks
from conadv_lab.mistakes import unknown
from conadv_lab.models.options import GRAPH_MODES
from conadv_lab.optim.groups import learning_rates, set_learning_rate
from conadv_lab.optim.rates import why_not
from conadv_lab.provenance import manifest
from conadv_lab.runs import RunFolder
from conadv_lab.training import growth, loggers
from conadv_lab.training.build import Parts, build
from conadv_lab.training.claim import Claim
from conadv_lab.training.distributed import PATIENCE, AnyLater, Ranks, Spectator, join
from conadv_lab.training.evaluate import calibrated_copy, evaluate
from conadv_lab.training.finite import (
    epoch_of,
    require_finite,
    require_finite_figures,
    require_finite_weights,
)
from conadv_lab.training.network import begin_step, network_of
from conadv_lab.training.overfitting import overfitting
from conadv_lab.training.process import put_back
from conadv_lab.training.reducer import Reducer, Shared
from conadv_lab.training.reports import Progress, Reports
from conadv_lab.training.result import result_of
from conadv_lab.training.resuming import fingerprints, reconciled, require_same_data, require_unchanged
from conadv_lab.training.saving import Saver
from conadv_lab.training.state import completed, load_state, newest, state_of
from conadv_lab.training.stopping import StoppedOnRequest, stop_requests
from conadv_lab.training.weights import average_of


def train(config: Config, out: str | Path, *, resume: bool = False, progress: Progress = "auto") -> RunFolder:
    """Train a config into a run folder at ``out``; with several ranks, all must call this.

    Args:
        config: see `conadv_lab.config`.
        out: the run folder; it must not exist, unless ``resume``.
        resume: continue from the latest intact checkpoint, bitwise as if never stopped (on a CPU), or from step 0
            if there is none; a finished run is left unchanged.
        progress: a bar on a terminal and in a notebook, lines elsewhere; or nothing.

    Raises:
        ValueError: a mistake in the config or the folder; nothing is written.
        StoppedOnRequest: TERM, INT or USR2 arrived; the state after that step is saved.
        NotFinite: the loss is NaN or infinite.
        OSError: the disk is full; earlier checkpoints are intact.
        AnotherRankFailed: another rank has died or does not answer.
    """
    with put_back():
        run = prepare(config, out, resume=resume, progress=progress)
        if run is not None:
            run.to_the_end()
    return RunFolder(out)


def prepare(
    config: Config, out: str | Path, *, resume: bool = False, progress: Progress = "auto"
) -> "Run | None":
    """The checked run that `train` would start; None if it is finished.

    Writes nothing but the lock that keeps other processes out of the folder until the run ends or is dropped. The
    process keeps the run's number of threads.

    Raises:
        ValueError: as for `train`.
    """
    if not isinstance(config, Config):
        raise ValueError(
            f"config is {config!r}; allowed: a Config, such as conadv_lab.recipes.find('digits-conadv')()"
        )
    if progress not in get_args(Progress):
        raise unknown("progress", progress, get_args(Progress))
    config = resolved(config)
    ranks = join(config)
    with ranks.failures_told(), ranks.agreed():
        run = _prepared(config, RunFolder(out) if ranks.first else Spectator(out), resume, progress, ranks)
    if run is None:
        ranks.leave()
        return None
    with ranks.failures_told(), ranks.agreed():
        ranks.require_own_gpus(run.parts.device)
        if ranks.first:
            run.claim.take()
            require_unchanged(run.config, run.folder, resume)
    return run


def _prepared(
    config: Config, folder: RunFolder, resume: bool, progress: Progress, ranks: Ranks
) -> "Run | None":
    with ranks.agreed():
        loggers.require_installed(config.training.log_to)
        config = reconciled(config, folder, resume)
    if ranks.told_by_first(int(folder.result() is not None)):
        return None
    run = Run(build(config, ranks), folder, progress if ranks.first else "none")
    require_same_data(run.config, folder, run.parts.train_set, run.parts.test_set)
    return run


class Run:
    """The state of a run between two steps; ``step`` is the number of the next step."""

    def __init__(self, parts: Parts, folder: RunFolder, progress: Progress) -> None:
        threads = torch.get_num_threads()
        parts.config = parts.config.replace(threads=threads)
        self.parts, self.folder, self.config, self.ranks = parts, folder, parts.config, parts.ranks
        several = self.ranks.trains and self.ranks.trainers > 1
        self.reducer = Reducer(parts.model, self.ranks.training) if several else None
        if self.reducer is not None:
            spread = self.config.training.batch_norm == "sync"
            parts.method.attach(parts.optimizer, Shared(self.reducer, self.ranks, spread))
        self.step = 0
        self.later = AnyLater(self.ranks)
        self.claim = Claim(folder.path)
        self.saver = Saver(folder)
        log_to = self.config.training.log_to if self.ranks.first else "none"
        self.reports = Reports(folder, parts.stream.steps, parts.stream.batch, log_to, progress)
        self.seconds_before = 0.0
        self.ema = average_of(parts.model, self.config.model.ema)
        self.network = network_of(parts.model, self.config.model, parts.device)
        groups = len(parts.optimizer.param_groups)
        resident = getattr(parts.train_set, "resident", False)
        lookahead = parts.method.lookahead
        self.feed = Feed(parts.stream, lookahead, parts.device, groups) if resident else None
        self.copies = Copies(parts.device, groups)
        rates, on_gpu = (self.feed or self.copies).block.rates, parts.device.type == "cuda"
        backend = self._backend()
        self.overlaps = backend is None
        self.program = Program(
            parts.model,
            self.network,
            parts.method,
            parts.optimizer,
            parts.criterion,
            average=self.ema,
            rates=rates if on_gpu and why_not(parts.optimizer) is None else (),
            backend=backend,
            required=self.config.training.capture == "on",
        )

    def _backend(self) -> Backend | None:
        """The backend that captures this run's steps, or None on all ranks; prints why not if that may surprise."""
        parts, model, choice = self.parts, self.config.model, self.config.training.capture
        reason = reason_against(
            parts.device,
            parts.optimizer,
            placement=self.config.method.placement,
            graphs=model.compile and model.compile_mode in GRAPH_MODES,
        )
        if self.reducer is not None:
            reason = reason or synchronised(parts.model)
        if choice == "auto":
            reason = reason or slower(parts.stream)
        backend, line = backend_of(choice, parts.device, self.ranks.first_reason(reason))
        if line and self.ranks.first:
            print(line, flush=True)
        return backend

    def to_the_end(self) -> None:
        """Start, train all remaining steps and finish; or stop between two steps on a signal."""
        with (
            stop_requests() as requests,
            self.claim,
            self.ranks.failures_told(),
            self.saver,
            self.reports.logger,
        ):
            self.start()
            while self.step < self.parts.stream.steps:
                self.train_step()
                if self.step == self.practised:
                    self._expect_answers()
                more = self.step < self.parts.stream.steps
                stop, gave_up = self.later.told(bool(requests), self.program.gave_up, more=more)
                if gave_up:
                    self._run_eagerly()
                if stop and more:
                    self.save()
                    self.saver.wait()
                    self.ranks.wait()
                    self.ranks.leave()
                    signal = requests[0] if requests else "a signal to another rank"
                    raise StoppedOnRequest(
                        f"stopped by {signal} after step {self.step}; continue with --resume"
                    )
            self.finish()
        self.ranks.leave()

    def start(self) -> None:
        """Continue from the latest checkpoint, or write the new folder's first files."""
        self.started = time.monotonic()
        self.folder.clear_leftovers()
        loaded = newest(self.folder, self.ranks)
        if loaded is None:
            images = fingerprints(self.parts.train_set, self.parts.test_set)
            self.folder.create(self.config, manifest(images) | self._placed())
            self.folder.cut_metrics(0)
        else:
            commit, state = loaded
            load_state(self.parts, self.ema, state, str(self.folder.path))
            self.step = self.saver.step = state["step"]
            self.seconds_before = state["seconds"]
            self.folder.cut_metrics(commit["metrics_bytes"])
            self.folder.note_config(self.config)
        self.reports.begin(self.config, self.step, continued=loaded is not None)
        # By then this process has run both branches and steps of every size.
        self.practised = self.step + self.parts.method.lookahead + 2
        self.ranks.wait()

    def train_step(self) -> None:
        """One global step, and the logging, evaluation and saving due after it."""
        # The order matters. The probe compares stale and fresh attacks at the weights before the update. The loss is
        # checked before the step counts, so no checkpoint is saved after a NaN. The line is logged before the
        # checkpoint, whose commit records the length of metrics.jsonl, so a resumed run neither loses nor repeats it.
        self.saver.check()
        parts, number = self.parts, self.step
        training = self.config.training
        begin_step(self.config.model)
        if not self.ranks.trains:
            self._attack_step(parts.stream.step(number, parts.method.lookahead))
            return
        lr = parts.schedule(number)
        step = self.prepared(number, lr)
        probed = (
            parts.method.probe(self.network, step, parts.criterion)
            if _due(number, training.probe_every)
            else {}
        )
        due = _due(number, training.log_every) or number == parts.stream.steps - 1
        growing = growth.growing(parts)
        noted = partial(growth.note, growing, parts, number) if growing is not None else None
        losses = self.program(step, self._reduction(step, due), noted)
        if growing is None and (due or parts.device.type == "cpu"):
            require_finite(losses, parts, self.folder, number)
        self.step = number + 1
        self.reports.stepped()
        line: dict[str, Any] = dict(probed)
        if growing is not None:
            line |= growth.judge(growing, parts, number, losses)
        if self._comes(training.evaluate_every):
            line |= self._evaluated()
            self.ranks.wait()
        if due or line:
            self.reports.log(number, epoch_of(parts, number), lr, losses, line)
        if self._comes(training.checkpoint_every):
            if growing is None:
                require_finite(losses, parts, self.folder, number)
            self.save()
            self.ranks.wait()

    def _expect_answers(self) -> None:
        """From now on a rank that keeps the others waiting within a step counts as failed."""
        self.ranks.expect_answers()
        placement = getattr(self.parts.method, "placement", None)
        if isinstance(placement, OtherRanks):
            placement.patience = PATIENCE

    def _run_eagerly(self) -> None:
        """A rank cannot capture its steps: from now on, after the same step on all ranks, none does."""
        if self.program.captures:
            self.program.give_up("another rank cannot capture them")
        self.overlaps = True

    def prepared(self, number: int, lr: float) -> Step:
        """The host's part of a step: puts its images and learning rates where the device expects them."""
        parts = self.parts
        rates = learning_rates(parts.optimizer, lr)
        if not self.program.rates:
            set_learning_rate(parts.optimizer, lr)
        if self.feed is not None:
            return self.feed.load(number, rates)
        step = parts.stream.step(number, parts.method.lookahead)
        # Without capture the images may be anywhere.
        return self.copies.load(step, parts.method.offsets(step) if self.program.captures else (), rates)

    def _reduction(self, step: Step, due: bool) -> Callable[[Callable[[], Losses]], Losses] | None:
        """Sums a step's gradient over ranks, during its last backward pass or between graphs; None for one rank."""
        parts, reducer = self.parts, self.reducer
        if reducer is None:
            return None

        def reduced(gradient: Callable[[], Losses]) -> Losses:
            passes = parts.method.passes(step) * len(parts.stream.own_spans(step.number))
            reducer.begin(passes if self.overlaps else 0)
            # Where steps are captured, a rank cannot know which of the others check.
            check = due or parts.device.type == "cpu" or not self.overlaps
            return reducer.finish(gradient(), check)

        return reduced

    def _attack_step(self, step: Step) -> None:
        """One step of a rank that only attacks."""
        method = self.parts.method
        assert isinstance(method, ConAdv)
        method.attack_ahead(self.network, step, self.parts.criterion)
        self.step = step.number + 1
        for every in (self.config.training.evaluate_every, self.config.training.checkpoint_every):
            if self._comes(every):
                self.ranks.wait()

    def _evaluated(self) -> dict[str, float]:
        """Metrics of the current weights, and whether catastrophic overfitting has begun."""
        figures = evaluate(self.parts, calibrated_copy(self.parts, self._judged()))
        before = self.folder.metrics() if self.ranks.first else []
        return figures | overfitting(self.parts.method, before, figures)

    def _comes(self, every: int) -> bool:
        """Whether something done every ``every`` steps is due now, between two steps."""
        return _due(self.step, every) and self.step < self.parts.stream.steps

    def save(self) -> None:
        """Start a checkpoint of the state after the last step; refuses NaN or infinite weights."""
        if self.saver.step == self.step or not self.ranks.trains:
            return
        require_finite_weights(self.parts, self.folder, self.step - 1)
        state = state_of(self.parts, self.ema, self.step, self._seconds())
        self.saver.save(self.step, state, partial(completed, self.parts, self.step))

    def finish(self) -> None:
        """Write the last checkpoint and the final metrics, which mark the run as finished."""
        self.save()
        parts = self.parts
        figures = self._evaluated() if self.ranks.trains else {}
        require_finite_figures(figures, parts, self.folder, self.step - 1)
        if self.ranks.first:
            result = result_of(parts, self.folder, figures, self.step, self._seconds())
            self.saver.wait()
            write_json(self.folder.path / "result.json", result)
            self.reports.end(self.step, result)
        self.ranks.wait()

    def _placed(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks.count,
            "attackers": self.ranks.attackers,
            "placement": self.config.method.placement,
            "clean_batch": self.parts.stream.batch,
        }

    def _judged(self) -> nn.Module:
        return self.parts.model if self.ema is None else self.ema.module

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
