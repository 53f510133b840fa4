"""PyTorch Lightning: a method computes the gradient of a LightningModule's training step.

This file does not need Lightning until a callback is created: `LightningMethod` is a mixin for your own module.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from conadv_lab import extras
from conadv_lab.data.loader import Step
from conadv_lab.integrations.ahead import Ahead, require_first, require_method, require_one_process
from conadv_lab.integrations.probe import SharpnessProbe
from conadv_lab.methods.base import Method
from conadv_lab.methods.forwards import Criterion

RANDOM = "conadv_lab_random"
"""Key of random states in Lightning's checkpoints."""


class LightningMethod:
    """Mixin before ``LightningModule``: ``class Mine(LightningMethod, lightning.LightningModule)``.

    The training step is `Method.backward` with manual optimisation; images go through the module's own ``forward``.
    One optimizer; its schedulers are stepped as configured in ``configure_optimizers``, except those that monitor a
    metric. To clip gradients, use the hook ``on_before_optimizer_step``.

    Call ``trainer.fit(module, module.look_ahead(loader))``. Checkpoints include pending attacks, as state of that
    loader. If you override ``on_fit_start``, ``on_train_start`` or checkpoint hooks, call ``super()``.

    Args:
        method: has state; do not share it with another module.
        criterion: (outputs, labels) to their mean loss.
    """

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        require_first(LightningMethod, cls)

    def __init__(self, method: Method, criterion: Criterion, **others: Any) -> None:
        require_method(method)
        super().__init__(**others)
        self.method, self.criterion = method, criterion
        self.automatic_optimization = False
        self._ahead: Ahead | None = None
        self._random: dict[str, Any] | None = None

    def look_ahead(self, loader: Iterable[Any], **options: Any) -> Ahead:
        """The loader for ``trainer.fit``; takes the options of `Ahead`, such as ``accumulate``."""
        module: Any = self
        self._ahead = Ahead(loader, self.method, device=lambda: module.device, **options)
        return self._ahead

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """A step is already on the right device."""
        base: Any = super()
        return (
            batch if isinstance(batch, Step) else base.transfer_batch_to_device(batch, device, dataloader_idx)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save random states, on which dropout depends and which Lightning leaves to its users."""
        base: Any = super()
        base.on_save_checkpoint(checkpoint)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint[RANDOM] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base: Any = super()
        base.on_load_checkpoint(checkpoint)
        self._random = checkpoint.get(RANDOM)

    def on_train_start(self) -> None:
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        epoch = trainer.num_training_batches if self._ahead is None else len(self._ahead)
        if trainer.num_training_batches != epoch and not trainer.fast_dev_run:
            raise ValueError(
                f"limit_train_batches leaves {trainer.num_training_batches} of an epoch's {epoch} steps; allowed: "
                "all, as the next epoch is already read ahead; use a shorter loader instead"
            )
        if self._random is None:
            return
        torch.set_rng_state(self._random["cpu"].cpu())
        if self._random["cuda"] and torch.cuda.device_count() == len(self._random["cuda"]):
            torch.cuda.set_rng_state_all([state.cpu() for state in self._random["cuda"]])
        self._random = None

    def on_fit_start(self) -> None:
        """Reject settings that the method does not support."""
        trainer = self.trainer  # type: ignore[attr-defined]
        require_one_process("Lightning", trainer.world_size)
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"precision is {trainer.precision!r}; allowed: '32-true' and 'bf16-mixed', as loss scaling does not "
                "cover the attack; for others convert module and images yourself, as by module.double()"
            )
        if self.automatic_optimization:
            raise ValueError(
                "automatic_optimization is True; allowed: False, as the method computes the gradient"
            )
        optimizers = self.optimizers(use_pl_optimizer=False)  # type: ignore[attr-defined]
        if isinstance(optimizers, list):
            raise ValueError(f"configure_optimizers returns {len(optimizers)} optimizers; allowed: one")
        self.method.attach(optimizers)

    def training_step(self, step: Step, batch_idx: int) -> Tensor:
        if not isinstance(step, Step):
            raise ValueError(
                f"the training step was given a {type(step).__name__}; allowed: a step of "
                "trainer.fit(module, module.look_ahead(loader))"
            )
        module: Any = self
        losses = self.method.backward(module, step, self.criterion)
        optimizer = module.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self._step_schedulers(module.trainer)
        if self._ahead is not None:
            self._ahead.done(step)
        told = {"loss": losses.clean}
        if losses.adversarial is not None:
            told["adversarial_loss"] = losses.adversarial
        module.log_dict(told, batch_size=step.size())
        return losses.clean

    def _step_schedulers(self, trainer: Any) -> None:
        for config in trainer.lr_scheduler_configs:
            due = config.interval == "step" or trainer.is_last_batch
            count = trainer.global_step if config.interval == "step" else trainer.current_epoch + 1
            needs_metric = isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            if due and not needs_metric and count % config.frequency == 0:
                config.scheduler.step()


def sharpness_callback(probe: SharpnessProbe) -> Any:
    """A Lightning callback that runs a probe after each training batch and logs its metrics.

    Raises:
        ValueError: Lightning is not installed.
    """
    lightning: Any = extras.load("lightning.pytorch", "adapters", "the sharpness callback of Lightning")

    class Sharpness(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            figures = probe(module, trainer.global_step)
            for name, value in figures.items():
                trainer.callback_metrics[name] = torch.tensor(value)
            for logger in trainer.loggers if figures else ():
                logger.log_metrics(figures, step=trainer.global_step)

    return Sharpness()
