"""Hugging Face's Trainer: the steps of our own loop, checkpoints that keep what is pending, and what is refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import conadv_lab as cl
from conadv_lab.integrations.huggingface import STATE, TrainerMethod, sharpness_callback
from conadv_lab.integrations.probe import SharpnessProbe
from tests.conftest import small_cnn
from tests.integrations.conftest import assert_equal_parameters
from tests.integrations.five_steps import GROUP, STEPS, converted, method, optimizer

transformers = pytest.importorskip("transformers", reason="the extra [adapters] is not installed")
pytest.importorskip("accelerate", reason="the extra [adapters] is not installed")


class MethodTrainer(TrainerMethod, transformers.Trainer):
    pass


class InOrder(MethodTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=3, remove_unused_columns=False,
        **({"save_strategy": "no", "logging_strategy": "no"} | more),
    )  # fmt: skip


def rows(images, labels) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def constant(sgd):
    return torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)


def test_five_steps_are_those_of_our_loop(ours, batches, tmp_path):
    model = converted()
    sgd = optimizer(model)
    trainer = InOrder(
        method=method(), accumulate=2, model=model, optimizers=(sgd, constant(sgd)),
        train_dataset=rows(*(torch.cat(parts) for parts in zip(*batches, strict=True))),
        args=arguments(tmp_path, max_steps=STEPS, per_device_train_batch_size=GROUP, max_grad_norm=0.0),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_equal_parameters(model, ours)


class Named(nn.Module):
    """As Hugging Face's models are called, with dropout."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.network = cl.mixture_batch_norm(nn.Sequential(nn.Dropout(0.1), small_cnn()))

    def forward(self, pixel_values, labels=None):
        return {"logits": self.network(pixel_values)}


METHODS = {
    "conadv": lambda: cl.ConAdv(cl.SignAttack(0.1), staleness=2),
    "recycled": lambda: cl.Recycled(0.1),
    "sam": lambda: cl.SAM(0.05),
}


def trainer_of(name: str, folder, steps: int, **more) -> MethodTrainer:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 2, 6, 6, generator=draw), torch.randint(0, 4, (16,), generator=draw)
    model = Named()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.5)
    return MethodTrainer(
        method=METHODS[name](), model=model, optimizers=(sgd, schedule), train_dataset=rows(images, labels),
        args=arguments(
            folder, max_steps=steps, per_device_train_batch_size=4, save_strategy="steps", save_steps=1, **more
        ),
    )  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class KilledAfter(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_after_an_exception_it_goes_on_bitwise(name, stop, tmp_path):
    """In the middle of an epoch of four steps, at its end, and in the next; the Trainer shuffles."""
    whole = trainer_of(name, tmp_path / "whole", 7)
    whole.train()
    killed = trainer_of(name, tmp_path / "part", 7)
    killed.add_callback(KilledAfter(stop))
    with pytest.raises(Killed):
        killed.train()
    assert (tmp_path / "part" / f"checkpoint-{stop}" / STATE).is_file()
    torch.manual_seed(99)
    resumed = trainer_of(name, tmp_path / "part", 7)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 7
    assert resumed.state.epoch == whole.state.epoch == 1.75
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    trainer_of("conadv", tmp_path, 6).train()
    resumed = trainer_of("conadv", tmp_path, 6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


@pytest.mark.slow
def test_resumed_after_a_sigkill_it_goes_on_bitwise(tmp_path):
    whole = trainer_of("conadv", tmp_path / "whole", 7)
    whole.train()
    command = [sys.executable, "-m", "tests.integrations.killed", "trainer", str(tmp_path / "part"), "3"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -9
    assert not (tmp_path / "part" / "checkpoint-4").exists()
    resumed = trainer_of("conadv", tmp_path / "part", 7)
    resumed.train(resume_from_checkpoint=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_sharpness_goes_to_the_logs(tmp_path):
    trainer = trainer_of("conadv", tmp_path, 4)
    images, labels = torch.rand(4, 2, 6, 6), torch.randint(0, 4, (4,))
    probe = SharpnessProbe(nn.CrossEntropyLoss(), (images, labels), ["trace"], every=2, share=1e9)
    trainer.add_callback(sharpness_callback(probe, trainer))
    trainer.train()
    logged = [line for line in trainer.state.log_history if "sharpness_trace" in line]
    assert [line["step"] for line in logged] == [2, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2; allowed: 1, and accumulate=2",
        ),
    ],
)
def test_what_trains_otherwise_is_refused(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of("conadv", tmp_path, 1, **more)


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    trainer = trainer_of("conadv", tmp_path, 1)
    trainer.train()
    (tmp_path / "checkpoint-1" / STATE).unlink()
    with pytest.raises(ValueError, match="allowed: a checkpoint saved by a trainer with TrainerMethod"):
        trainer_of("conadv", tmp_path, 2).train(resume_from_checkpoint=True)


def test_a_loss_of_the_trainers_own_and_a_mixin_that_comes_too_late_are_refused(tmp_path):
    class OwnLoss(MethodTrainer):
        def compute_loss(self, *_, **__):
            raise NotImplementedError

    given = {"model": Named(), "args": arguments(tmp_path), "method": METHODS["sam"]()}
    with pytest.raises(ValueError, match="OwnLoss overrides compute_loss; allowed: the Trainer's own, with"):
        OwnLoss(**given).train()
    with pytest.raises(ValueError, match=r"compute_loss_func is .*; allowed: None, with the loss"):
        MethodTrainer(compute_loss_func=lambda outputs, labels, **_: None, **given).train()
    trainer = MethodTrainer(**given)
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor is 0\.1; allowed: 0, with the loss as criterion="
    ):
        trainer.train()
    with pytest.raises(TypeError, match=r"allowed: class Late\(TrainerMethod, Trainer\)"):
        type("Late", (transformers.Trainer, TrainerMethod), {})
