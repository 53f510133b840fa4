"""The probes of the staleness study against the run's own probe, and against a rendering with stored weights."""

import copy

import pytest
import torch

from analysis import staleness
from analysis.arms import Cell
from analysis.measuring import trained
from conadv_lab.models.norm import branch_of
from conadv_lab.runs import RunFolder
from conadv_lab.training.loop import prepare


def config(tau: int):
    return Cell("", "conadv", 64, 9).config(0.2, 0).replace(staleness=tau)


@pytest.mark.parametrize("tau", [1, 2])
def test_sign_agreement_is_that_of_the_runs_own_probe(tau, tmp_path):
    found = staleness.probed(config(tau), tmp_path / "ours")
    trained(config(tau).replace(probe_every=staleness.PROBE_EVERY), tmp_path / "theirs")
    lines = RunFolder(tmp_path / "theirs").metrics()
    assert [probe["agreement"] for probe in found["probes"][1:]] == pytest.approx(
        [line["sign_agreement"] for line in lines if line["step"]]
    )


def test_the_probes_do_not_change_the_run(tmp_path):
    found = staleness.probed(config(2), tmp_path / "probed")
    plain = trained(config(2), tmp_path / "plain")
    assert found["parameters_sha256"] == plain["parameters_sha256"]


def test_without_staleness_the_attack_is_fresh(tmp_path):
    found = staleness.probed(config(0), tmp_path / "run")
    assert found["sign_agreement"] == found["gain_ratio"] == 1.0


def test_gains_are_those_of_images_attacked_with_stored_weights(tmp_path):
    tau, at = 2, 4
    run = prepare(config(tau), tmp_path / "run", progress="none")
    kept = []
    with run.saver:
        run.start()
        while run.step < at:
            kept.append(copy.deepcopy(run.parts.model))
            run.train_step()
        found = staleness._compared(run)
        model, method, criterion = run.parts.model, run.parts.method, run.parts.criterion
        (batch,) = run.parts.stream.step(at, tau).batches()
        losses = []
        for attacked in (kept[at - tau], model):
            images = method.attack.apply(batch, method.attack.perturb(attacked, batch, criterion))
            with torch.no_grad(), branch_of(model, "adversarial", "batch"):
                losses.append(float(criterion(model(images), batch.labels)))
        with torch.no_grad(), branch_of(model, "adversarial", "batch"):
            clean = float(criterion(model(batch.images), batch.labels))
    assert found["stale_gain"] == pytest.approx(losses[0] - clean)
    assert found["fresh_gain"] == pytest.approx(losses[1] - clean)
    assert losses[0] < losses[1]
