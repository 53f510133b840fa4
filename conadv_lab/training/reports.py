"""Progress of a run: a bar or printed lines, and metrics in its folder and a logger."""

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
    """Reports of one run; the caller closes its logger."""

    def __init__(self, folder: RunFolder, steps: int, batch: int, log_to: str, progress: Progress) -> None:
        self.folder, self.steps, self.batch = folder, steps, batch
        self.on_terminal = progress == "auto" and (sys.stderr.isatty() or in_notebook())
        self.lines = progress == "auto" and not self.on_terminal
        self.logger = loggers.Quiet(log_to)

    def begin(self, config: Config, step: int, continued: bool) -> None:
        """Start reporting at this step, the first one or the one resumed from."""
        if continued and (self.lines or self.on_terminal):
            where = f"continues at step {step + 1} of {self.steps}"
            told = where if step < self.steps else "has trained all steps"
            print(f"{self.folder.path} {told}", file=sys.stderr, flush=True)
        self.logger.open(self.folder.path, config.to_dict(), step)
        self.bar = _bar(self.steps, step) if self.on_terminal else None
        self.logged_at = time.monotonic(), step

    def stepped(self) -> None:
        """Advance the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def log(self, number: int, epoch: float, lr: float, losses: Losses, more: dict[str, Any]) -> None:
        """Log the metrics of a completed step."""
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
        """Log the final metrics and close the bar."""
        self.logger.log(step - 1, {f"final_{name}": figure for name, figure in result.items()})
        if self.bar is not None:
            self.bar.close()
        if self.lines:
            print(f"test accuracy {result['test_accuracy']:.2f} % after {step} steps", flush=True)


def _bar(steps: int, step: int) -> Any:
    from tqdm.auto import tqdm  # only where a bar is shown: benchmarks run without tqdm

    return tqdm(total=steps, initial=step, unit="step")
