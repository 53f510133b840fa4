"""One training run, from a config to a finished run folder; it can be stopped at any moment and continued."""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

from conadv_lab.capture.choice import backend_of, reason_against
from conadv_lab.capture.feed import Copies, Feed
from conadv_lab.capture.program import Program
from conadv_lab.capture.replays import Backend
from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Step
from conadv_lab.displays import in_notebook
from conadv_lab.files import write_json
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.placement import OtherRanks
from conadv_lab.models.options import GRAPH_MODES
from conadv_lab.optim.autowu import AutoWU
from conadv_lab.optim.groups import learning_rates, set_learning_rate
from conadv_lab.optim.rates import plain_state, why_not
from conadv_lab.provenance import manifest
from conadv_lab.runs import RunFolder
from conadv_lab.training import growth, loggers
from conadv_lab.training.build import Parts, build
from conadv_lab.training.claim import Claim
from conadv_lab.training.distributed import PATIENCE, AnyLater, Ranks, Spectator, join
from conadv_lab.training.evaluate import calibrated_copy, evaluate, statistics_used
from conadv_lab.training.network import begin_step, network_of
from conadv_lab.training.overfitting import KEY, first_told, overfitting
from conadv_lab.training.pending import gatherable_state, gathered_state, scattered_state
from conadv_lab.training.process import put_back
from conadv_lab.training.reducer import Reducer, Shared
from conadv_lab.training.resuming import fingerprints, reconciled, require_same_data, require_unchanged
from conadv_lab.training.saving import Saver
from conadv_lab.training.stopping import StoppedOnRequest, stop_requests
from conadv_lab.training.weights import (
    average_of,
    load_optimizer,
    load_weights,
    on_device,
    parameters_sha256,
)

Progress = Literal["auto", "none"]


class NotFinite(ArithmeticError):
    """A loss became NaN or infinite; nothing of that step was saved."""


def train(config: Config, out: str | Path, *, resume: bool = False, progress: Progress = "auto") -> RunFolder:
    """Train as ``config`` says and leave a run folder at ``out``; with all ranks, where there are several.

    Args:
        config: see `conadv_lab.config`.
        out: the run folder; it must not exist, unless ``resume``.
        resume: continue from the newest intact checkpoint, bitwise as if never stopped (on a CPU); from step 0
            where there is none; a finished run is left as it is.
        progress: a bar on a terminal and in a notebook, lines elsewhere; or nothing.

    Raises:
        ValueError: a mistake in the config or the folder; nothing is written.
        StoppedOnRequest: TERM, INT or USR2 came; the state of that step is saved.
        NotFinite: the loss is no number any more.
        OSError: the disk is full; earlier checkpoints are intact.
        AnotherRankFailed: another rank is gone or does not answer.
    """
    with put_back():
        run = prepare(config, out, resume=resume, progress=progress)
        if run is not None:
            run.to_the_end()
    return RunFolder(out)


def prepare(
    config: Config, out: str | Path, *, resume: bool = False, progress: Progress = "auto"
) -> "Run | None":
    """The run that `train` would begin, every mistake found; None where it is finished.

    Nothing is written but the lock that keeps other processes out of the folder, until the run ends or is dropped.
    The process keeps the run's number of threads.

    Raises:
        ValueError: as for `train`.
    """
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
    """The state of a run between two steps; ``step`` is the number of the next one."""

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
        self.stop = AnyLater(self.ranks)
        self.claim = Claim(folder.path)
        self.saver = Saver(folder)
        self.logger = loggers.Quiet(self.config.training.log_to if self.ranks.first else "none")
        self.seconds_before = 0.0
        self.ema = average_of(parts.model, self.config.model.ema)
        self.network = network_of(parts.model, self.config.model, parts.device)
        groups = len(parts.optimizer.param_groups)
        resident = getattr(parts.train_set, "resident", False)
        lookahead = parts.method.lookahead
        self.feed = Feed(parts.stream, lookahead, parts.device, groups) if resident else None
        self.copies = Copies(parts.device, groups)
        rates, on_gpu = (self.feed or self.copies).block.rates, parts.device.type == "cuda"
        self.program = Program(
            parts.model,
            self.network,
            parts.method,
            parts.optimizer,
            parts.criterion,
            average=self.ema,
            rates=rates if on_gpu and why_not(parts.optimizer) is None else (),
            backend=self._backend(),
            required=self.config.training.capture == "on",
        )
        self.on_terminal = progress == "auto" and (sys.stderr.isatty() or in_notebook())
        self.lines = progress == "auto" and not self.on_terminal

    def _backend(self) -> Backend | None:
        """Who captures this run's steps, if anybody does; says why not where that is worth a line."""
        parts, model, method = self.parts, self.config.model, self.config.method
        graphs = model.compile and model.compile_mode in GRAPH_MODES
        reason = reason_against(
            parts.device,
            parts.optimizer,
            ranks=self.ranks.trainers,
            placement=method.placement,
            graphs=graphs,
        )
        backend, line = backend_of(self.config.training.capture, parts.device, reason, parts.stream)
        if line and self.ranks.first:
            print(line, flush=True)
        return backend

    def to_the_end(self) -> None:
        """Start, take every step that is left, and finish; or stop between two steps where a signal asks for it."""
        with stop_requests() as requests, self.claim, self.ranks.failures_told(), self.saver, self.logger:
            self.start()
            while self.step < self.parts.stream.steps:
                self.train_step()
                if self.step == self.practised:
                    self._expect_answers()
                more = self.step < self.parts.stream.steps
                if self.stop.told(bool(requests), more) and more:
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
        """Continue from the newest checkpoint, or write the new folder's first files."""
        self.started = time.monotonic()
        self.folder.clear_leftovers()
        loaded = self._newest()
        if loaded is None:
            images = fingerprints(self.parts.train_set, self.parts.test_set)
            self.folder.create(self.config, manifest(images) | self._placed())
            self.folder.cut_metrics(0)
        else:
            self._restore(*loaded)
            self.folder.note_config(self.config)
            if self.lines or self.on_terminal:
                last = self.parts.stream.steps
                told = (
                    f"continues at step {self.step + 1} of {last}"
                    if self.step < last
                    else "has trained all steps"
                )
                print(f"{self.folder.path} {told}", file=sys.stderr, flush=True)
        self.logger.open(self.folder.path, self.config.to_dict(), self.step)
        self.bar = _bar(self.parts.stream.steps, self.step) if self.on_terminal else None
        self.logged_at = self.started, self.step
        # By then this process has trained on both branches and on a step of every size.
        self.practised = self.step + self.parts.method.lookahead + 2
        self.ranks.wait()

    def train_step(self) -> None:
        """One global step, and whatever is due after it."""
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
            self._require_finite(losses, number)
        self.step = number + 1
        if self.bar is not None:
            self.bar.update()
        line: dict[str, Any] = dict(probed)
        if growing is not None:
            line |= growth.judge(growing, parts, number, losses)
        if self._comes(training.evaluate_every):
            line |= self._evaluated()
            self.ranks.wait()
        if due or line:
            self._log(number, lr, losses, line)
        if self._comes(training.checkpoint_every):
            if growing is None:
                self._require_finite(losses, number)
            self.save()
            self.ranks.wait()

    def _expect_answers(self) -> None:
        """From now on a rank that keeps the others waiting within a step has failed."""
        self.ranks.expect_answers()
        placement = getattr(self.parts.method, "placement", None)
        if isinstance(placement, OtherRanks):
            placement.patience = PATIENCE

    def prepared(self, number: int, lr: float) -> Step:
        """The host's part of a step: its images and learning rates are where the device looks for them."""
        parts = self.parts
        rates = learning_rates(parts.optimizer, lr)
        if not self.program.rates:
            set_learning_rate(parts.optimizer, lr)
        if self.feed is not None:
            return self.feed.load(number, rates)
        step = parts.stream.step(number, parts.method.lookahead)
        # Where nothing is captured the images may lie anywhere.
        return self.copies.load(step, parts.method.offsets(step) if self.program.captures else (), rates)

    def _reduction(self, step: Step, due: bool) -> Callable[[Callable[[], Losses]], Losses] | None:
        """What sums a step's gradient over ranks while its last backward goes on; None for one rank."""
        parts, reducer = self.parts, self.reducer
        if reducer is None:
            return None

        def reduced(gradient: Callable[[], Losses]) -> Losses:
            reducer.begin(parts.method.passes(step) * len(parts.stream.own_spans(step.number)))
            return reducer.finish(gradient(), check=due or parts.device.type == "cpu")

        return reduced

    def _attack_step(self, step: Step) -> None:
        """What a rank that only attacks does in a step."""
        method = self.parts.method
        assert isinstance(method, ConAdv)
        method.attack_ahead(self.network, step, self.parts.criterion)
        self.step = step.number + 1
        for every in (self.config.training.evaluate_every, self.config.training.checkpoint_every):
            if self._comes(every):
                self.ranks.wait()

    def _evaluated(self) -> dict[str, float]:
        """The figures of the weights as they are now, and whether training began to overfit to its attack."""
        figures = evaluate(self.parts, calibrated_copy(self.parts, self._judged()))
        before = self.folder.metrics() if self.ranks.first else []
        return figures | overfitting(self.parts.method, before, figures)

    def _first_overfitting(self, figures: dict[str, float]) -> dict[str, int | None]:
        """For the result: after which step it was first told of, or None; nothing where nobody looked."""
        if not (self.config.training.pgd_images and self.parts.method.single_step):
            return {}
        now = [{"step": self.step - 1} | figures]
        return {f"{KEY}_step": first_told([*self.folder.metrics(), *now])}

    def _comes(self, every: int) -> bool:
        """Whether what is done every so many steps is due now, between two steps."""
        return _due(self.step, every) and self.step < self.parts.stream.steps

    def save(self) -> None:
        """Begin a checkpoint of the state after the last step; weights that are no numbers are not saved."""
        if self.saver.step == self.step or not self.ranks.trains:
            return
        parameters = [p.detach() for p in self.parts.model.parameters()]
        if not torch.isfinite(torch.stack(torch._foreach_norm(parameters))).all():
            raise NotFinite(
                f"a weight is NaN or infinite after step {self.step - 1} {self._told(self.step - 1)}"
            )
        stream, ranks, step = self.parts.stream, self.ranks, self.step

        def completed(state: dict[str, Any]) -> dict[str, Any]:
            return state | {"method": gathered_state(state["method"], stream, ranks, step)}

        self.saver.save(step, self._state(), completed)

    def finish(self) -> None:
        """The last checkpoint, the final figures, and with them the mark that the run is done."""
        self.save()
        parts = self.parts
        figures = self._evaluated() if self.ranks.trains else {}
        for name, figure in figures.items():
            if not math.isfinite(figure):
                raise NotFinite(f"the final {name} is {figure} {self._told(self.step - 1)}")
        if not self.ranks.first:
            self.ranks.wait()
            return
        images = parts.stream.first_place(self.step)
        result = figures | {
            "steps": self.step,
            **self._first_overfitting(figures),
            "epochs_seen": images / len(parts.train_set),
            "clean_images": round(images / max(1, parts.method.new_fraction)),
            **_costs(parts.method, self.step),
            **{f"method_{name}": getattr(parts.method, name) for name in ("label", "colour", "marker")},
            "seconds": self._seconds(),
            "bn_recalibrated_on": min(self.config.training.bn_recalibrate, len(parts.train_set)),
            "bn_statistics": statistics_used(parts),
            "parameters_sha256": parameters_sha256(parts.model),
        }
        if isinstance(parts.schedule, AutoWU):
            result |= parts.schedule.figures()
        self.saver.wait()
        write_json(self.folder.path / "result.json", result)
        self.logger.log(self.step - 1, {f"final_{name}": figure for name, figure in result.items()})
        if self.bar is not None:
            self.bar.close()
        if self.lines:
            print(f"test accuracy {figures['test_accuracy']:.2f} % after {self.step} steps", flush=True)
        self.ranks.wait()

    def _state(self) -> dict[str, Any]:
        """What this rank's checkpoint is made of; of ranks other than 0 that is their part of the method's state."""
        parts = self.parts
        method = gatherable_state(parts.method)
        if not self.ranks.first:
            return {"method": method}
        return {
            "step": self.step,
            "seconds": self._seconds(),
            "model": parts.model.state_dict(),
            "optimizer": plain_state(parts.optimizer),
            "method": method,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "schedule": parts.schedule.state_dict() if isinstance(parts.schedule, AutoWU) else None,
        }

    def _restore(self, commit: dict[str, Any], state: dict[str, Any]) -> None:
        parts = self.parts
        load_weights(parts.model, state["model"], str(self.folder.path))
        load_optimizer(parts.optimizer, state["optimizer"], str(self.folder.path))
        own = scattered_state(state["method"], parts.stream, self.ranks, state["step"])
        parts.method.load_state_dict(on_device(own, parts.device))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if isinstance(parts.schedule, AutoWU):
            parts.schedule.load_state_dict(state["schedule"], parts.device)
        self.step = self.saver.step = state["step"]
        self.seconds_before = state["seconds"]
        self.folder.cut_metrics(commit["metrics_bytes"])

    def _newest(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(commit, state) that rank 0 continues from, on all ranks."""
        there = self.ranks.first and self.folder.checkpoints.exists()
        loaded = self.folder.load_checkpoint() if there else None
        step = self.ranks.told_by_first(-1 if loaded is None else loaded[1]["step"])
        if self.ranks.first or step < 0:
            return loaded
        return read_checkpoint(self.folder.checkpoints / f"step_{step:08d}")

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

    def _require_finite(self, losses: Losses, number: int) -> None:
        for name, loss in (("clean", losses.clean), ("adversarial", losses.adversarial)):
            if loss is not None and not math.isfinite(loss.item()):
                raise NotFinite(f"the {name} loss is {loss.item()} at step {number} {self._told(number)}")

    def _told(self, number: int) -> str:
        saved = [folder.name for folder in self.folder.committed()[:1]]
        return (
            f"(epoch {self._epoch(number):.2f}, lr {self.parts.schedule(number):.4g}); "
            f"last checkpoint: {saved[0] if saved else 'none'}. "
            "A lower --lr or a longer --warmup-epochs may help"
        )

    def _epoch(self, number: int) -> float:
        return self.parts.stream.first_place(number) / len(self.parts.train_set)

    def _log(self, number: int, lr: float, losses: Losses, more: dict[str, Any]) -> None:
        now = time.monotonic()
        before, at = self.logged_at
        images = (self.step - at) * self.parts.stream.batch
        rate = images / max(now - before, 1e-9)
        self.logged_at = now, self.step
        line = {"step": number, "epoch": self._epoch(number), "lr": lr, "loss": losses.clean.item()}
        if losses.adversarial is not None:
            line["adversarial_loss"] = losses.adversarial.item()
        told = line | more | {"images_per_second": rate}
        self.folder.append_metrics(told)
        self.logger.log(number, told)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if self.lines:
            print(
                f"step {self.step}/{self.parts.stream.steps} epoch {line['epoch']:.2f} lr {lr:.4g} "
                f"loss {line['loss']:.4f} {rate:.0f} images/s",
                flush=True,
            )


def _costs(method: Method, steps: int) -> dict[str, float]:
    """Cost and depth of a step, averaged over the run's; and how many of them were left out, if any were."""
    each = [method.step_cost(number, steps) for number in range(steps)]
    told: dict[str, float] = {}
    for name, values in zip(("gradient_evaluations", "depth"), zip(*each, strict=True), strict=True):
        told[name] = values[0] if len(set(values)) == 1 else fmean(values)
    return told | ({"steps_left_out": method.left_out} if method.left_out else {})


def _bar(steps: int, step: int) -> Any:
    from tqdm.auto import tqdm  # not needed where nobody looks, as on a machine that has torch alone

    return tqdm(total=steps, initial=step, unit="step")


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
