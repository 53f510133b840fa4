"""Hugging Face's Trainer: a method computes the gradient of its training step.

This file does not need transformers until a callback is created: `TrainerMethod` is a mixin for the library's class.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from conadv_lab import extras
from conadv_lab.data.loader import Step
from conadv_lab.integrations.ahead import Ahead, require_first, require_method, require_one_process
from conadv_lab.integrations.probe import SharpnessProbe
from conadv_lab.methods.base import Method
from conadv_lab.methods.forwards import Criterion
from conadv_lab.mistakes import require

STATE = "conadv_lab.pt"
"""File for pending attacks in each of the Trainer's checkpoint folders."""


class TrainerMethod:
    """Mixin before ``Trainer``: ``class ConAdvTrainer(TrainerMethod, transformers.Trainer): pass``.

    The Trainer still handles optimizer, schedule, clipping, logging and evaluation. The model is called with images
    alone, ``model(pixel_values)``, or with a token batch without its labels; the criterion takes its logits.
    Each checkpoint folder gets an extra file with the pending attacks.

    Args:
        method: has state; do not share it with another trainer.
        criterion: (outputs, labels) to their mean loss; None: cross-entropy.
        accumulate: batches of the Trainer's loader in one step, in place of ``gradient_accumulation_steps``.
        embeddings: a token model's embedding layer, ``model.get_input_embeddings()``; see `conadv_lab.lookahead`.
        others: keyword arguments of ``Trainer``.

    Raises:
        ValueError: arguments that the method does not support.
    """

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        require_first(TrainerMethod, cls)

    def __init__(
        self,
        *,
        method: Method,
        criterion: Criterion | None = None,
        accumulate: int = 1,
        embeddings: nn.Module | None = None,
        **others: Any,
    ) -> None:
        require_method(method)
        super().__init__(**others)
        self.method, self.accumulate, self.embeddings = method, accumulate, embeddings
        self.criterion = criterion or nn.CrossEntropyLoss()
        self._ahead: Ahead | None = None
        self._checkpoint: Path | None = None
        _require_plain(self.args)  # type: ignore[attr-defined]

    def _require_no_other_loss(self) -> None:
        trainer: Any = self
        allowed = "with the loss as criterion= of TrainerMethod, (outputs, labels) to their mean loss"
        given, smoothing = trainer.compute_loss_func, trainer.args.label_smoothing_factor
        require(given is None, "compute_loss_func", given, f"None, {allowed}")
        require(not smoothing, "label_smoothing_factor", smoothing, f"0, {allowed}")
        library = extras.load("transformers", "adapters", "TrainerMethod").Trainer
        if type(trainer).compute_loss is not library.compute_loss:
            raise ValueError(
                f"{type(trainer).__name__} overrides compute_loss; allowed: the Trainer's own, {allowed}"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **others: Any) -> Any:
        """Like the Trainer's own; also restores pending attacks from the checkpoint."""
        self._require_no_other_loss()
        trainer_utils = extras.load("transformers.trainer_utils", "adapters", "TrainerMethod")
        folder = resume_from_checkpoint
        if folder is True:
            folder = trainer_utils.get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        self._checkpoint = Path(folder) if folder else None
        base: Any = super()
        return base.train(resume_from_checkpoint=resume_from_checkpoint, **others)

    def get_train_dataloader(self) -> Any:
        base: Any = super()
        args: Any = self.args  # type: ignore[attr-defined]
        self._ahead = Ahead(
            base.get_train_dataloader(), self.method, accumulate=self.accumulate, device=args.device,
            steps=args.max_steps if args.max_steps > 0 else None, embeddings=self.embeddings,
        )  # fmt: skip
        trained = 0
        if self._checkpoint is not None:
            self._ahead.load_state_dict(_state_in(self._checkpoint))
            trained = 0 if args.ignore_data_skip else self._ahead.number % len(self._ahead)
        return DataLoader(_Steps(self._ahead, trained), batch_size=None)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The next step; the Trainer's own method would look for labels in it to count them."""
        step = next(epoch_iterator, None)
        return ([] if step is None else [step]), None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not isinstance(inputs, Step):
            raise ValueError(f"the training step was given a {type(inputs).__name__}; allowed: a Step")
        trainer: Any = self
        model.train()
        if inputs.number == trainer._ahead.trained == 0 or self.method.optimizer is None:
            self.method.attach(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
        with trainer.compute_loss_context_manager():
            losses = self.method.backward(model, inputs, self.criterion)
        trainer._ahead.done(inputs)
        return losses.clean

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's estimate for the step's images, times the method's cost."""
        base: Any = super()
        if not isinstance(inputs, Step):
            return base.floating_point_ops(inputs)
        name = getattr(self.model, "main_input_name", "input_ids")  # type: ignore[attr-defined]
        inputs_of = (
            {name: batch.images if batch.tokens is None else batch.tokens.ids} for batch in inputs.batches()
        )
        return round(sum(map(base.floating_point_ops, inputs_of)) * self.method.gradient_evaluations)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        base: Any = super()
        base._save_checkpoint(model, trial)
        trainer: Any = self
        if self._ahead is not None and trainer.args.should_save:
            folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
            torch.save(self._ahead.state_dict(), folder / STATE)


class _Steps(IterableDataset):
    """Steps for the Trainer; skipping steps of a resumed epoch costs nothing."""

    def __init__(self, ahead: Ahead, trained: int) -> None:
        self.ahead, self.trained = ahead, trained

    def __len__(self) -> int:
        return len(self.ahead)

    def __iter__(self) -> Iterator[Any]:
        passed, self.trained = self.trained, 0
        yield from [0] * passed
        yield from self.ahead


def _require_plain(args: Any) -> None:
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; allowed: 1, and "
            f"accumulate={args.gradient_accumulation_steps} of TrainerMethod, which combines batches into one step"
        )
    require_one_process("the Trainer", args.world_size)
    if args.n_gpu > 1:  # of one process, in DataParallel
        raise ValueError(f"the Trainer uses {args.n_gpu} GPUs; allowed: 1, as with CUDA_VISIBLE_DEVICES=0")
    if args.fp16:
        raise ValueError(
            "fp16 is True; allowed: False, or bf16=True, as loss scaling does not cover the attack"
        )


def _state_in(folder: Path) -> dict[str, Any]:
    if not (folder / STATE).is_file():
        raise ValueError(
            f"{folder} has no {STATE}; allowed: a checkpoint saved by a trainer with TrainerMethod"
        )
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def sharpness_callback(probe: SharpnessProbe, trainer: Any) -> Any:
    """A callback that runs a probe after each step, for ``trainer.add_callback``; metrics go to the Trainer's logs.

    Raises:
        ValueError: transformers is not installed.
    """
    transformers: Any = extras.load("transformers", "adapters", "the sharpness callback of the Trainer")

    class Sharpness(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            figures = probe(model, state.global_step)
            if figures:
                trainer.log(figures)

    return Sharpness()
