"""Where a run's metrics go besides its folder: TensorBoard, Weights & Biases or MLflow.

The folder remains authoritative: loggers get what was written there, and one that fails is dropped with one warning.
Names are those of ``metrics.jsonl``, and those of ``result.json`` with the prefix ``final_``.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from conadv_lab import extras

EXTRA = "adapters"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Logger(Protocol):
    """Receives a run's metrics while it trains."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log metrics by name, for a step counted from 0."""

    def close(self) -> None:
        """Finish; everything logged is stored on return."""


def require_installed(name: str) -> None:
    """Raise ``ValueError`` if the logger's package is missing."""
    if name != "none":
        extras.load(PACKAGES[name], EXTRA, f"log_to {name!r}")


class Nothing:
    """No logger."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class Quiet:
    """A run's logger, which never stops the run: after its first failure it warns once and logs nothing more.

    A context manager that closes the logger.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.logger: Logger = Nothing()

    def open(self, folder: Path, config: dict[str, dict[str, Any]], step: int) -> None:
        """Open it for a run folder that starts or resumes at ``step``."""
        makers: dict[str, Callable[[], Logger]] = {
            "none": Nothing,
            "tensorboard": lambda: TensorBoard(folder, step),
            "wandb": lambda: WandB(folder, config),
            "mlflow": lambda: MLflow(folder, config),
        }
        self.logger = self._tried(makers[self.name]) or Nothing()

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_: object) -> None:
        self._tried(lambda: self.logger.close())

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        self._tried(lambda: self.logger.log(step, numbers))

    def _tried(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:  # whatever a library, a disk or a network raises
            told = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"logging to {self.name} failed and is now off ({type(error).__name__}: {told[0]}); "
                "the run folder has all metrics"
            )
            self.logger = Nothing()
            return None


class TensorBoard:
    """Event files in the run folder's ``tensorboard/``; resuming purges what was logged after the checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, named after the folder; ``WANDB_PROJECT`` and ``WANDB_MODE`` decide the rest."""

    def __init__(self, folder: Path, config: dict[str, dict[str, Any]]) -> None:
        wandb = extras.load("wandb", EXTRA, "log_to 'wandb'")
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        self.run = wandb.init(dir=str(folder), id=name, name=folder.name, config=config, resume="allow")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run, in the experiment and store set by its environment variables; its id is in the run folder."""

    def __init__(self, folder: Path, config: dict[str, dict[str, Any]]) -> None:
        self.client = extras.load("mlflow", EXTRA, "log_to 'mlflow'").MlflowClient()
        note = folder / "mlflow_run.txt"
        if note.is_file():
            self.run = note.read_text().strip()
            self.client.set_terminated(self.run, status="RUNNING")
            return
        self.run = self.client.create_run(self._experiment(), run_name=folder.name).info.run_id
        note.write_text(self.run + "\n")
        for section, values in config.items():
            for key, value in values.items():
                self.client.log_param(self.run, f"{section}.{key}", value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)

    def _experiment(self) -> str:
        """The id of the experiment, which is created if missing."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "conadv_lab")
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)
