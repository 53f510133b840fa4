"""What a run says of itself while it goes on: a bar or printed lines, and metrics in its folder and in a logger."""

import sys
import time
from typing import Any, Literal

from conadv_lab.config import Config
from conadv_lab.displays import in_notebook
from conadv_lab.methods.base import Losses
from conadv_lab.runs import RunFolder
from conadv_lab.training import loggers

Progress = Literal["auto", "none"]


class Reports:
    """Of one run; its logger is closed by whoever enters it."""

    def __init__(self, folder: RunFolder, steps: int, batch: int, log_to: str, progress: Progress) -> None:
        self.folder, self.steps, self.batch = folder, steps, batch
        self.on_terminal = progress == "auto" and (sys.stderr.isatty() or in_notebook())
        self.lines = progress == "auto" and not self.on_terminal
        self.logger = loggers.Quiet(log_to)

    def begin(self, config: Config, step: int, continued: bool) -> None:
        """The run starts at a step, or goes on there."""
        if continued and (self.lines or self.on_terminal):
            where = f"continues at step {step + 1} of {self.steps}"
            told = where if step < self.steps else "has trained all steps"
            print(f"{self.folder.path} {told}", file=sys.stderr, flush=True)
        self.logger.open(self.folder.path, config.to_dict(), step)
        self.bar = _bar(self.steps, step) if self.on_terminal else None
        self.logged_at = time.monotonic(), step

    def stepped(self) -> None:
        """A step is done."""
        if self.bar is not None:
            self.bar.update()

    def log(self, number: int, epoch: float, lr: float, losses: Losses, more: dict[str, Any]) -> None:
        """A line of metrics of a step that is done."""
        now, done = time.monotonic(), number + 1
        before, at = self.logged_at
        rate = (done - at) * self.batch / max(now - before, 1e-9)
        self.logged_at = now, done
        line = {"step": number, "epoch": epoch, "lr": lr, "loss": losses.clean.item()}
        if losses.adversarial is not None:
            line["adversarial_loss"] = losses.adversarial.item()
        told = line | more | {"images_per_second": rate}
        self.folder.append_metrics(told)
        self.logger.log(number, told)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        if self.lines:
            print(
                f"step {done}/{self.steps} epoch {epoch:.2f} lr {lr:.4g} loss {line['loss']:.4f} {rate:.0f} images/s",
                flush=True,
            )

    def end(self, step: int, result: dict[str, Any]) -> None:
        """The final figures after so many steps."""
        self.logger.log(step - 1, {f"final_{name}": figure for name, figure in result.items()})
        if self.bar is not None:
            self.bar.close()
        if self.lines:
            print(f"test accuracy {result['test_accuracy']:.2f} % after {step} steps", flush=True)


def _bar(steps: int, step: int) -> Any:
    from tqdm.auto import tqdm  # not needed where nobody looks, as on a machine that has torch alone

    return tqdm(total=steps, initial=step, unit="step")
