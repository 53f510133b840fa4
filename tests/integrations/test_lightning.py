"""Lightning: the steps of our own loop, checkpoints that keep what is pending, and what is refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import conadv_lab as cl
from conadv_lab.integrations.lightning import LightningMethod, sharpness_callback
from conadv_lab.integrations.probe import SharpnessProbe
from tests.conftest import small_cnn
from tests.integrations.conftest import assert_equal_parameters
from tests.integrations.five_steps import STEPS, converted, method, optimizer

lightning = pytest.importorskip("lightning.pytorch", reason="the extra [adapters] is not installed")

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Five(LightningMethod, lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__(method(), nn.CrossEntropyLoss())
        self.network = converted()

    def forward(self, images):
        return self.network(images)

    def configure_optimizers(self):
        return optimizer(self)


class Shuffled(LightningMethod, lightning.LightningModule):
    """With momentum, a schedule, dropout and a loader that is shuffled without a seed."""

    def __init__(self, method) -> None:
        super().__init__(method, nn.CrossEntropyLoss())
        self.network = cl.mixture_batch_norm(nn.Sequential(nn.Dropout(0.1), small_cnn()))

    def forward(self, images):
        return self.network(images)

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=2, gamma=0.5)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_five_steps_are_those_of_our_loop(ours, batches, tmp_path):
    module = Five()
    trainer = lightning.Trainer(
        max_steps=STEPS, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET
    )
    trainer.fit(module, module.look_ahead(batches, accumulate=2))
    assert trainer.global_step == STEPS
    assert_equal_parameters(module.network, ours)


def data() -> DataLoader:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 2, 6, 6, generator=draw), torch.randint(0, 4, (16,), generator=draw)
    return DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)


METHODS = {
    "conadv": lambda: cl.ConAdv(cl.SignAttack(0.1), staleness=2),
    "recycled": lambda: cl.Recycled(0.1),
    "sam": lambda: cl.SAM(0.05),
}


def fitted(name: str, folder, steps: int, checkpoint=None, seed: int = 1, callbacks=()):
    lightning.seed_everything(seed)
    module = Shuffled(METHODS[name]())
    saves = lightning.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_steps=steps, default_root_dir=folder, callbacks=[saves, *callbacks], **QUIET
    )
    trainer.fit(module, module.look_ahead(data()), ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == steps
    return module


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_from_a_checkpoint_it_goes_on_bitwise(name, stop, tmp_path):
    """In the middle of an epoch of four steps, at its end, and in the next."""
    whole = fitted(name, tmp_path / "whole", 7)
    fitted(name, tmp_path / "part", stop)
    resumed = fitted(name, tmp_path / "part", 7, tmp_path / "part" / f"step={stop}.ckpt", seed=2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.slow
def test_resumed_after_a_sigkill_it_goes_on_bitwise(tmp_path):
    whole = fitted("conadv", tmp_path / "whole", 7)
    command = [sys.executable, "-m", "tests.integrations.killed", "lightning", str(tmp_path / "part"), "3"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -9
    assert not (tmp_path / "part" / "step=4.ckpt").exists()
    resumed = fitted("conadv", tmp_path / "part", 7, tmp_path / "part" / "step=3.ckpt", seed=2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_sharpness_goes_to_metrics_and_logger(tmp_path):
    module = Shuffled(METHODS["conadv"]())
    images, labels = next(iter(data()))
    probe = SharpnessProbe(nn.CrossEntropyLoss(), (images, labels), ["trace"], every=2, share=1e9)
    logger = lightning.loggers.CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_steps=4,
        default_root_dir=tmp_path,
        callbacks=[sharpness_callback(probe)],
        **(QUIET | {"logger": logger}),
    )
    trainer.fit(module, module.look_ahead(data()))
    assert trainer.callback_metrics["sharpness_trace"] != 0
    assert {"loss", "adversarial_loss"} <= trainer.callback_metrics.keys()
    logger.save()
    assert "sharpness_trace" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_a_loader_that_does_not_look_ahead_is_refused(tmp_path):
    module = Shuffled(METHODS["conadv"]())
    trainer = lightning.Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(
        ValueError, match=r"given a list; allowed: a step of trainer\.fit\(module, module\.look_ahead"
    ):
        trainer.fit(module, data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_train_batches": 3}, "limit_train_batches leaves 3 of an epoch's 4 steps; allowed: all"),
        ({"precision": "16-true"}, "precision is '16-true'; allowed: '32-true'"),
        ({"precision": "64-true"}, "precision is '64-true'; allowed: '32-true'"),
    ],
)
def test_what_trains_otherwise_than_it_looks_is_refused(options, message, tmp_path):
    module = Shuffled(METHODS["conadv"]())
    trainer = lightning.Trainer(
        max_epochs=2, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET, **options
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, module.look_ahead(data()))


def test_a_fast_development_run_takes_one_step(tmp_path):
    module = Shuffled(METHODS["conadv"]())
    trainer = lightning.Trainer(fast_dev_run=True, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, module.look_ahead(data()))
    assert trainer.global_step == 1


def test_automatic_optimisation_is_refused(tmp_path):
    module = Shuffled(METHODS["conadv"]())
    module.automatic_optimization = True
    trainer = lightning.Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="automatic_optimization is True; allowed: False"):
        trainer.fit(module, module.look_ahead(data()))


def test_a_scheduler_that_needs_a_metric_is_left_to_its_user(tmp_path):
    class Plateau(Shuffled):
        def configure_optimizers(self):
            sgd = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}

    module = Plateau(METHODS["conadv"]())
    trainer = lightning.Trainer(max_epochs=2, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, module.look_ahead(data()))
    assert trainer.global_step == 8


def test_what_is_no_method_and_a_mixin_that_comes_too_late_are_refused():
    with pytest.raises(ValueError, match="method is 'conadv'; allowed: a method, such as ConAdv"):
        Shuffled("conadv")
    own = type("Own", (lightning.LightningModule,), {"training_step": lambda self, batch, number: None})
    with pytest.raises(TypeError, match=r"allowed: class Late\(LightningMethod, Own\)"):
        type("Late", (own, LightningMethod), {})
