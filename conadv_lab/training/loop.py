"""One training run, from a config to a finished run folder; it can be stopped at any moment and continued."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from conadv_lab.config import Config, resolved
from conadv_lab.methods.adversarial import ConAdv
from conadv_lab.methods.base import Losses
from conadv_lab.runs import RunFolder, manifest, write_json
from conadv_lab.training.build import Parts, build
from conadv_lab.training.evaluate import calibrated_copy, evaluate

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
Progress = Literal["auto", "none"]


class StoppedOnRequest(Exception):
    """A signal asked the run to stop; its checkpoint is saved, and it can be resumed."""


class NotFinite(ArithmeticError):
    """A loss became NaN or infinite; nothing of that step was saved."""


def train(config: Config, out: str | Path, *, resume: bool = False, progress: Progress = "auto") -> RunFolder:
    """Train as ``config`` says and leave a run folder at ``out``.

    Args:
        config: see `conadv_lab.config`.
        out: the run folder; it must not exist, unless ``resume``.
        resume: continue from the newest intact checkpoint, bitwise as if never stopped (on a CPU); from step 0
            where there is none; a finished run is left as it is.
        progress: a bar on a terminal and lines elsewhere, or nothing.

    Raises:
        ValueError: a mistake in the config or the folder; nothing is written.
        StoppedOnRequest: TERM, INT or USR2 came; the state of that step is saved.
        NotFinite: the loss is no number any more.
        OSError: the disk is full; earlier checkpoints are intact.
    """
    run = prepare(config, out, resume=resume, progress=progress)
    if run is not None:
        run.to_the_end()
    return RunFolder(out)


def prepare(
    config: Config, out: str | Path, *, resume: bool = False, progress: Progress = "auto"
) -> "Run | None":
    """The run that `train` would begin, every mistake found and nothing written; None where it is finished.

    Raises:
        ValueError: as for `train`.
    """
    folder = RunFolder(out)
    config = _reconciled(resolved(config), folder, resume)
    if folder.result() is not None:
        return None
    run = Run(build(config), folder, progress)
    if (folder.path / "manifest.json").exists():
        before, now = folder.manifest().get("data"), _fingerprint(run.parts)
        if before is not None and before != now:
            raise ValueError(f"{folder.path} was started on other data: {before}; now {now}")
    return run


def _reconciled(config: Config, folder: RunFolder, resume: bool) -> Config:
    """The config, its machine-dependent gaps filled from the folder that is resumed; refuses any other conflict."""
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"{folder.path} is a file; pass the path of a folder as --out")
    if not folder.path.exists() or not any(folder.path.iterdir()):
        return config
    if not resume:
        raise ValueError(f"{folder.path} exists already; pass --resume to continue it, or another --out")
    if not (folder.path / "config.json").exists():
        if any(not child.name.startswith(".") and child.name != "manifest.json" and child.name != "checkpoints"
               for child in folder.path.iterdir()):  # fmt: skip
            raise ValueError(f"{folder.path} is no run folder, so it cannot be resumed; pass another --out")
        return config
    before = folder.config()
    if config.training.threads is None:
        config = config.replace(threads=before.training.threads)
    ours, theirs = config.to_dict(), before.to_dict()
    different = [
        f"{name} is {ours[section][name]!r}, was {value!r}"
        for section, values in theirs.items()
        for name, value in values.items()
        if ours[section][name] != value
    ]
    if different:
        raise ValueError(f"{folder.path} was started with another config: {'; '.join(different)}")
    return config


class Run:
    """The state of a run between two steps; ``step`` is the number of the next one."""

    def __init__(self, parts: Parts, folder: RunFolder, progress: Progress) -> None:
        threads = torch.get_num_threads()
        parts.config = parts.config.replace(threads=threads)
        self.parts, self.folder, self.config = parts, folder, parts.config
        self.step = 0
        self.saved: int | None = None
        self.seconds_before = 0.0
        self.ema = _average(parts)
        self.network = _forward_of(parts)
        self.on_terminal = progress == "auto" and sys.stderr.isatty()
        self.lines = progress == "auto" and not self.on_terminal

    def to_the_end(self) -> None:
        """Start, take every step that is left, and finish; or stop between two steps where a signal asks for it."""
        with _stop_requests() as requests:
            self.start()
            while self.step < self.parts.stream.steps:
                self.train_step()
                if requests and self.step < self.parts.stream.steps:
                    self.save()
                    raise StoppedOnRequest(
                        f"stopped by {requests[0]} after step {self.step}; continue with --resume"
                    )
            self.finish()

    def start(self) -> None:
        """Continue from the newest checkpoint, or write the new folder's first files."""
        self.started = time.monotonic()
        loaded = self.folder.load_checkpoint() if self.folder.checkpoints.exists() else None
        if loaded is None:
            self.folder.create(self.config, manifest(_fingerprint(self.parts)))
            self.folder.cut_metrics(0)
        else:
            self._restore(*loaded)
        self.bar = tqdm(
            total=self.parts.stream.steps, initial=self.step, unit="step", disable=not self.on_terminal
        )
        self.logged_at = self.started, self.step

    def train_step(self) -> None:
        """One global step, and whatever is due after it."""
        parts, number = self.parts, self.step
        training = self.config.training
        step = parts.stream.step(number, parts.method.lookahead)
        lr = parts.schedule(number)
        for group in parts.optimizer.param_groups:
            group["lr"] = lr
        agreement = self._probe(step) if _due(number, training.probe_every) else None
        losses = parts.method.backward(self.network, step, parts.criterion)
        due = _due(number, training.log_every) or number == parts.stream.steps - 1
        if due or parts.device.type == "cpu":
            self._require_finite(losses, number)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(parts.model)
        self.step = number + 1
        self.bar.update()
        line: dict[str, Any] = {} if agreement is None else {"sign_agreement": agreement}
        if _due(self.step, training.evaluate_every) and self.step < parts.stream.steps:
            line |= evaluate(parts, calibrated_copy(parts, self._judged()))
        if due or line:
            self._log(number, lr, losses, line)
        if self.step % training.checkpoint_every == 0 and self.step < parts.stream.steps:
            self._require_finite(losses, number)
            self.save()

    def save(self) -> None:
        """Checkpoint the state after the last step; weights that are no numbers are not saved."""
        if self.saved == self.step:
            return
        parameters = [p.detach() for p in self.parts.model.parameters()]
        if not torch.isfinite(torch.stack(torch._foreach_norm(parameters))).all():
            raise NotFinite(
                f"a weight is NaN or infinite after step {self.step - 1} {self._told(self.step - 1)}"
            )
        self.folder.save_checkpoint(self.step, self._state())
        self.saved = self.step

    def finish(self) -> None:
        """The last checkpoint, the final figures, and with them the mark that the run is done."""
        self.save()
        parts = self.parts
        figures = evaluate(parts, calibrated_copy(parts, self._judged()))
        for name, figure in figures.items():
            if not math.isfinite(figure):
                raise NotFinite(f"the final {name} is {figure} {self._told(self.step - 1)}")
        images = parts.stream.first_place(self.step)
        result = figures | {
            "steps": self.step,
            "epochs_seen": images / len(parts.train_set),
            "clean_images": images,
            "gradient_evaluations": parts.method.gradient_evaluations,
            "depth": parts.method.depth,
            "seconds": self._seconds(),
            "bn_recalibrated_on": min(self.config.training.bn_recalibrate, len(parts.train_set)),
            "parameters_sha256": parameters_sha256(parts.model),
        }
        write_json(self.folder.path / "result.json", result)
        self.bar.close()
        if self.lines:
            print(f"test accuracy {figures['test_accuracy']:.2f} % after {self.step} steps", flush=True)

    def _state(self) -> dict[str, Any]:
        parts = self.parts
        return {
            "step": self.step,
            "seconds": self._seconds(),
            "model": parts.model.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "method": parts.method.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def _restore(self, commit: dict[str, Any], state: dict[str, Any]) -> None:
        parts = self.parts
        load_weights(parts.model, state["model"], str(self.folder.path))
        parts.optimizer.load_state_dict(state["optimizer"])
        parts.method.load_state_dict(_on_device(state["method"], parts.device))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = self.saved = state["step"]
        self.seconds_before = state["seconds"]
        self.folder.cut_metrics(commit["metrics_bytes"])

    def _judged(self) -> nn.Module:
        return self.parts.model if self.ema is None else self.ema.module

    def _probe(self, step: Any) -> float | None:
        method = self.parts.method
        if not isinstance(method, ConAdv):
            return None
        return method.sign_agreement(self.network, step, self.parts.criterion)

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
        self.folder.append_metrics(line | more | {"images_per_second": rate})
        if self.on_terminal:
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if self.lines:
            print(
                f"step {self.step}/{self.parts.stream.steps} epoch {line['epoch']:.2f} lr {lr:.4g} "
                f"loss {line['loss']:.4f} {rate:.0f} images/s",
                flush=True,
            )


def parameters_sha256(model: nn.Module) -> str:
    """Hash of all parameters' names and bytes: equal for bitwise equal models."""
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str) -> None:
    """Load a state dict, or say in one sentence what does not fit.

    Raises:
        ValueError: names or shapes of another model.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [n for n in sorted(own.keys() & weights.keys()) if own[n].shape != weights[n].shape]
    if missing or extra or wrong:
        found = [("missing", missing), ("unexpected", extra), ("of another shape", wrong)]
        told = "; ".join(f"{len(names)} {what}, such as {names[0]!r}" for what, names in found if names)
        raise ValueError(f"the checkpoint in {place} is of another model: {told}")
    model.load_state_dict(weights)


@contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """Names of the stop signals that came; each is only noted, and acted on between two steps."""
    came: list[str] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, as in some notebooks and tests: signals are somebody else's
        yield came
        return
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _average(parts: Parts) -> AveragedModel | None:
    decay = parts.config.model.ema
    return AveragedModel(parts.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def _forward_of(parts: Parts) -> nn.Module:
    """The network that the method calls: the model itself, compiled or under autocast where asked."""
    section = parts.config.model
    network = parts.model
    if section.precision == "bfloat16":
        network = Autocast(network, parts.device.type)
    return torch.compile(network) if section.compile else network  # type: ignore[return-value]


class Autocast(nn.Module):
    """Runs a network's forward in bfloat16 where that is safe, and gives its outputs in float32."""

    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.network(images).float()


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _fingerprint(parts: Parts) -> str:
    fingerprint = getattr(parts.train_set, "fingerprint", None)
    return fingerprint() if fingerprint else f"{len(parts.train_set)} images"


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on_device(item, device) for key, item in value.items()}
    return [_on_device(item, device) for item in value] if isinstance(value, list) else value
