"""Runs whose learning rate AutoWU finds: what they write, how they go on, what ends the growth."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.config import resolved
from conadv_lab.frames import frame_of_metrics
from conadv_lab.methods.base import Losses, Vanilla
from conadv_lab.plots import growth
from conadv_lab.recipes import digits
from conadv_lab.training import loop
from conadv_lab.training.build import build
from conadv_lab.training.finite import NotFinite
from conadv_lab.training.loop import train
from tests.training.test_loop import digest, tiny, train_killed_before

FIRST = 1e-3


def autowu(**changes):
    """11 steps, of which 5 grow; a test after each epoch of 3."""
    return tiny(schedule="autowu", first_lr=FIRST, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(autowu(method="conadv"), tmp_path_factory.mktemp("growth") / "whole", progress="none")


def test_the_run_tells_what_it_found_and_why(whole):
    result, lines = whole.result(), whole.metrics()
    assert (result["autowu_switch"], result["autowu_reason"]) == (5, "half of all steps have been taken")
    tested = [line for line in lines if "autowu_probability" in line]
    assert [line["step"] for line in tested] == [2, 4]
    assert tested[-1]["autowu_lr"] == result["autowu_lr"]
    assert tested[-1]["autowu_reason"] == result["autowu_reason"]
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[2] == pytest.approx(FIRST * (1 / FIRST) ** (2 / 5))
    assert rates[6] == rates[8] == result["autowu_lr"]
    assert 0 < rates[10] < result["autowu_lr"]


def test_a_figure_shows_rates_losses_and_tests(whole, tmp_path):
    axes = growth(frame_of_metrics({"run": whole}), Figure().subplots())
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["learning rate", "test: the loss has turned", "test: not turned", "clean loss"]
    assert axes.get_title() == "growth ended after step 4: half of all steps have been taken"
    plain = frame_of_metrics({"run": whole}).drop(columns="autowu_probability")
    with pytest.raises(ValueError, match="allowed: metrics of a run with --schedule autowu"):
        growth(plain, Figure().subplots())


def test_lr_is_the_ceiling_and_no_warmup_is_on_record():
    section = resolved(autowu(warmup_epochs=2, base_lr=0.3, lr_rule="linear")).optimization
    assert (section.lr, section.lr_rule, section.warmup_epochs) == (1.0, "none", 0.0)
    assert resolved(autowu(lr=4.0)).optimization.lr == 4.0


@pytest.mark.parametrize("stops", [(1, 4), (5, 8)])
def test_two_kills_later_the_switch_and_every_bit_are_the_same(whole, stops, tmp_path, monkeypatch):
    config = autowu(method="conadv", checkpoint_every=1)
    for stop in stops:
        train_killed_before(stop, config, tmp_path / "run", monkeypatch)
    resumed = train(config, tmp_path / "run", resume=True, progress="none")
    assert digest(resumed) == digest(whole)
    both = [{k: v for k, v in f.result().items() if k != "seconds"} for f in (whole, resumed)]
    assert both[0] == both[1]
    untimed = [[line | {"images_per_second": 0} for line in f.metrics()] for f in (whole, resumed)]
    assert untimed[0] == untimed[1]


def test_groups_keep_their_ratio(tmp_path):
    folder = train(autowu(method="vanilla", bias_lr_factor=8.0), tmp_path / "run", progress="none")
    for checkpoint in folder.committed():
        rates = {g["lr"] for g in read_checkpoint(checkpoint)[1]["optimizer"]["param_groups"]}
        assert len(rates) == 2
        assert max(rates) / min(rates) == pytest.approx(8.0)


def broken_at(steps, monkeypatch):
    """Losses of these steps, and gradients with them, are no numbers."""
    original = Vanilla.gradient

    def gradient(self, model, step, criterion):
        losses = original(self, model, step, criterion)
        if step.number not in steps:
            return losses
        for param in model.parameters():
            if param.grad is not None:
                param.grad.fill_(math.nan)
        return Losses(losses.clean * math.nan)

    monkeypatch.setattr(Vanilla, "gradient", gradient)


def test_a_loss_that_is_no_number_ends_the_growth_and_not_the_run(tmp_path, monkeypatch):
    broken_at([3], monkeypatch)
    folder = train(autowu(method="vanilla", checkpoint_every=4), tmp_path / "run", progress="none")
    result = folder.result()
    assert (result["autowu_switch"], result["autowu_reason"]) == (4, "the loss of step 3 is nan")
    assert FIRST <= result["autowu_lr"] <= FIRST * (1 / FIRST) ** (2 / 5)
    assert math.isfinite(result["test_loss"])


def test_after_the_growth_it_stops_the_run_as_ever(tmp_path, monkeypatch):
    broken_at([3, 7], monkeypatch)
    with pytest.raises(NotFinite, match="the clean loss is nan at step 7"):
        train(autowu(method="vanilla"), tmp_path / "run", progress="none")


def test_losses_are_read_by_the_host_after_an_epoch_only(tmp_path, monkeypatch):
    """As on a GPU, where each reading would wait: the growth's notes take the tensor as it is."""
    read = []
    monkeypatch.setattr(loop.growth, "_broken", lambda losses: read.append(losses) or False)
    parts = build(resolved(autowu(method="vanilla")))
    schedule, loss = parts.schedule, torch.tensor(1.0, device="meta")
    schedule.losses = torch.empty(5, device="meta")
    loop.growth.note(schedule, parts, 0, Losses(loss, loss))
    parts.device = torch.device("cuda")
    assert loop.growth.judge(schedule, parts, 0, Losses(loss)) == {}
    assert not read


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"first_lr": 2.0}, r"lr is 1\.0; allowed: a finite number above first_lr, which is 2\.0"),
    ({"cooldown": 1.5}, r"cooldown is 1\.5; allowed: 0 to 1"),
])  # fmt: skip
def test_impossible_settings_are_refused_before_anything_is_written(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        train(autowu().replace(**changes), tmp_path / "run", progress="none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "lamb", "adamp"])
def test_every_optimizer_grows_and_may_be_clipped(optimizer, tmp_path):
    if optimizer == "adamp":
        pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed (extra optim)")
    config = digits.vanilla().replace(
        train_images=90, global_batch=32, steps=7, threads=1, schedule="autowu", optimizer=optimizer,
        adaptive_clipping=0.01, channels_last=False, bn_recalibrate=90,
    )  # fmt: skip
    folder = train(config, tmp_path / "run", progress="none")
    assert folder.result()["autowu_switch"] == 3


def test_adamp_and_channels_last_are_refused_together():
    with pytest.raises(ValueError, match=r"channels_last is True; allowed with optimizer 'adamp': False"):
        resolved(digits.vanilla().replace(optimizer="adamp"))
