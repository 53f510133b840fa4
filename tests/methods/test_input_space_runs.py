"""Runs with the methods in input space: by name alone, resumed, counted honestly, refused, judged under attack."""

import warnings

import pytest
import torch

from conadv_lab import train as train_command
from conadv_lab.config import Config, resolved
from conadv_lab.data.lookahead import lookahead
from conadv_lab.methods import METHODS, method_of, options_of
from conadv_lab.methods.attack import PGDAttack, SignAttack
from conadv_lab.methods.families.advprop import FastAdvProp
from conadv_lab.methods.families.conadv import DisAdv
from conadv_lab.methods.families.robust import FGSMRS, FreeAT
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.plan import plan_of
from conadv_lab.sharpness import measure
from conadv_lab.staleness.timeline.step_times import named
from conadv_lab.staleness.timeline.workload import workload_of
from conadv_lab.training import evaluate
from conadv_lab.training.build import build, build_stream
from conadv_lab.training.distributed import Ranks
from conadv_lab.training.loop import train
from conadv_lab.training.overfitting import first_told, overfitting
from conadv_lab.training.restore import restore
from tests.conftest import image_set, small_cnn
from tests.training.test_loop import digest, tiny, train_killed_before

NAMES = ("advprop", "fast-advprop", "free-at", "fgsm-rs")
QUICK = ["--train-images", "90", "--global-batch", "20", "--warmup-epochs", "0", "--threads", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_by_name_alone_on_digits(name, tmp_path):
    words = ["digits-conadv", "--method", name, "--steps", "3", *QUICK]
    config = train_command.parse(words)[0]
    result = train(config, tmp_path / "run", progress="none").result()
    method = method_of(resolved(config))
    assert (result["gradient_evaluations"], result["depth"]) == (method.gradient_evaluations, method.depth)
    assert result["clean_images"] == (20 if name == "free-at" else 60)  # three steps of four on one batch
    assert plan_of(config).images == 20


def test_the_list_of_methods_names_each_ones_own_options(capsys):
    assert options_of("fast-advprop") == ["--epsilon", "--attack-step"]
    assert options_of("free-at") == ["--epsilon", "--attack-step", "--replays"]
    assert "--attack-target" in options_of("advprop")
    assert "--attack-steps" not in options_of("fgsm-rs")
    assert "--replays" not in options_of("conadv")
    assert train_command.main(["--list", "methods"]) == 0
    assert "  --epsilon --attack-step --replays\n" in capsys.readouterr().out


def test_defaults_are_those_of_the_papers():
    """4/255 in steps of 1/255 is five steps of ε/4; FGSM-RS takes 1.25 ε."""

    def filled(name, **options):
        return resolved(Config().replace(method=name, epsilon=4 / 255, **options)).method

    advprop = filled("advprop")
    assert (advprop.attack_steps, advprop.staleness) == (5, 0)
    assert advprop.attack_step == pytest.approx(1 / 255)
    assert filled("advprop", attack_steps=1).attack_step == pytest.approx(4 / 255)
    assert filled("fgsm-rs").attack_step == pytest.approx(5 / 255)
    assert filled("free-at").replays == 4
    conadv = filled("conadv")
    assert (conadv.attack_steps, conadv.staleness, conadv.attack_step) == (1, 1, pytest.approx(4 / 255))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "advprop", "staleness": 2, "attack_steps": 2, "attack_target": "random"},
        {"method": "fast-advprop", "micro_batch": 8},
        {"method": "free-at", "replays": 3, "micro_batch": 10},
        {"method": "fgsm-rs", "staleness": 1},
    ],
    ids=lambda changes: changes["method"],
)
def test_a_killed_run_ends_bitwise_as_one_that_was_not(changes, tmp_path, monkeypatch):
    """Checkpoints after steps 4 and 8: within a batch of FreeAT, and with attacks that wait."""
    config = tiny(**changes)
    whole = train(config, tmp_path / "whole", progress="none")
    train_killed_before(6, config, tmp_path / "killed", monkeypatch)
    train_killed_before(10, config, tmp_path / "killed", monkeypatch)
    assert digest(train(config, tmp_path / "killed", resume=True, progress="none")) == digest(whole)


def test_an_epoch_is_a_pass_however_often_a_batch_is_replayed(tmp_path):
    config = tiny(method="free-at", replays=3, steps=None, epochs=2, global_batch=30, warmup_epochs=1)
    parts = build(resolved(config))
    assert parts.stream.steps == 2 * 3 * 90 // 30
    assert parts.schedule.warmup == 9
    places = [parts.stream.own_spans(number) for number in range(parts.stream.steps)]
    assert places[:4] == [[(0, 30)], [(0, 30)], [(0, 30)], [(30, 60)]]
    result = train(config, tmp_path / "run", progress="none").result()
    assert (result["steps"], result["epochs_seen"], result["clean_images"]) == (18, 2, 180)


def test_others_of_fast_advprop_are_new_images(tmp_path):
    result = train(
        tiny(method="fast-advprop", steps=9, global_batch=40), tmp_path / "run", progress="none"
    ).result()
    assert result["clean_images"] == 360
    assert result["epochs_seen"] == 9 * 50 / 90


REFUSED = {
    "others": ({"method": "fast-advprop", "global_batch": 30}, "global_batch is 30; allowed: for fast-advprop: a mult"),
    "groups": ({"method": "fast-advprop", "micro_batch": 6}, "micro_batch is 6; allowed: for fast-advprop: a multiple"),
    "replays": ({"method": "free-at", "replays": 0}, "replays is 0; allowed: a whole number of at least 1"),
    "target": ({"method": "advprop", "attack_target": "any"}, "unknown attack_target 'any'"),
    "steps": ({"method": "advprop", "attack_steps": 0}, "attack_steps is 0; allowed: a whole number of at least 1"),
    "fresh": ({"method": "advprop", "placement": "ranks"}, "placement is 'ranks'; allowed for advprop with stal"),
    "no queue": ({"method": "free-at", "placement": "ranks"}, "placement is 'ranks'; allowed for free-at"),
    "a kept gradient": ({"method": "fast-advprop", "placement": "ranks"}, "placement is 'ranks'; allowed for fast"),
    "a step of nothing": ({"method": "fgsm-rs", "attack_step": 0.0}, "attack_step is 0.0; allowed: above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        resolved(tiny(**changes))


def test_a_slice_that_does_not_come_in_fives_is_refused_before_the_run():
    config = resolved(tiny(method="fast-advprop", batch_norm="sync", global_batch=36))
    images, ranks = image_set(90), Ranks(count=3)
    assert build_stream(config, method_of(config), images, ranks).own_spans(0) == [(0, 15)]
    both = {"early_method": "fast-advprop", "late_method": "fast-advprop"}
    late = resolved(tiny(method="late-sam", **both, batch_norm="sync", global_batch=36))
    for other in (config, late):
        with pytest.raises(ValueError, match="micro-batch is 22; allowed: a multiple of 5 on each rank"):
            build_stream(other, method_of(other), images, Ranks(count=2))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "late-sam"])
def test_late_sam_without_a_late_part_is_its_early_method(method, tmp_path):
    early = {"method": "late-sam", "early_method": method, "late_method": method, "late_share": 0.0}
    digests = [
        digest(train(tiny(**changes), tmp_path / str(number), progress="none"))
        for number, changes in enumerate(({"method": method}, early))
    ]
    assert digests[0] == digests[1]


def test_the_simulator_takes_their_own_staleness():
    workload = workload_of("imagenet-resnet50-1k")
    taus = {name: named(name, workload).staleness for name in ("advprop", "fgsm-rs", "conadv")}
    assert taus == {"advprop": 0, "fgsm-rs": 0, "conadv": 1}


def batches(size: int):
    draw = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 2, 6, 6, generator=draw), torch.arange(size) % 4) for _ in range(3)]


def test_own_loops_are_told_of_replays_and_fives():
    model, criterion = mixture_batch_norm(small_cnn()), torch.nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"each batch 1 times; FreeAT needs lookahead\(…, replays=4\)"):
        FreeAT(0.1).backward(model, next(lookahead(batches(5), 3)), criterion)
    with pytest.raises(ValueError, match="images of a micro-batch is 6; allowed: a multiple of 5"):
        FastAdvProp(0.1).backward(model, next(lookahead(batches(6), 3)), criterion)
    method = FreeAT(0.1, replays=2)
    sums = []
    for step in lookahead(batches(5), 5, replays=method.replays):
        method.backward(model, step, criterion)
        sums.append(next(iter(step.batches())).images.sum().item())
    assert sums[0] == sums[1] != sums[2] == sums[3] != sums[4]
    assert float(method.pending[0].abs().max()) == pytest.approx(0.1)


def test_a_longer_batch_gives_its_new_places_fresh_noise():
    model, criterion, method = (
        mixture_batch_norm(small_cnn()),
        torch.nn.CrossEntropyLoss(),
        FreeAT(0.1, replays=1),
    )
    loader = [batches(5)[0], batches(8)[1]]
    first, second = lookahead(loader, 2)
    method.backward(model, first, criterion)
    (kept,) = method.pending
    method.begin(model, second, criterion)
    method.end(second)
    (noise,) = method.pending
    assert torch.equal(noise[:5], kept)
    assert kept.any()
    assert not noise[5:].any()


HISTORY = [{"step": 9, "loss": 1.0}, {"step": 10, "pgd_accuracy": 44.0}, {"step": 19, "loss": 0.5}]


@pytest.mark.parametrize(
    ("method", "now", "told"),
    [
        (FGSMRS(0.1), 3.0, 41.0), (FGSMRS(0.1), 24.0, None), (FGSMRS(0.1), 60.0, None),
        (DisAdv(SignAttack(0.1)), 3.0, 41.0), (DisAdv(PGDAttack(0.1, steps=3)), 3.0, None), (FreeAT(0.1), 20.0, 24.0),
    ],
)  # fmt: skip
def test_a_drop_of_more_than_twenty_points_is_catastrophic_overfitting(method, now, told):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = overfitting(method, HISTORY, {"pgd_accuracy": now})
    assert found == ({} if told is None else {"catastrophic_overfitting": told})
    assert [str(one.message).partition(";")[0] for one in warned] == (
        []
        if told is None
        else [f"catastrophic overfitting: PGD accuracy fell from 44.0 to {now:.1f} % between two evaluations"]
    )
    assert overfitting(method, HISTORY[:1], {"pgd_accuracy": now}) == {}


def test_a_run_tells_it_in_metrics_result_and_a_warning(tmp_path, monkeypatch):
    accuracies = iter([50.0, 45.0, 10.0, 8.0])
    monkeypatch.setattr(evaluate, "pgd_accuracy", lambda parts, judged: next(accuracies))
    config = tiny(method="fgsm-rs", steps=8, evaluate_every=2, pgd_images=20)
    with pytest.warns(UserWarning, match=r"fell from 45.0 to 10.0 %"):
        folder = train(config, tmp_path / "run", progress="none")
    assert {
        line["step"]: line["catastrophic_overfitting"]
        for line in folder.metrics()
        if "catastrophic_overfitting" in line
    } == {5: 35.0}
    assert folder.result()["catastrophic_overfitting_step"] == first_told(folder.metrics()) == 5


def test_a_run_that_does_not_says_so_and_one_of_vanilla_says_nothing(tmp_path):
    fine = train(
        tiny(method="fgsm-rs", steps=2, pgd_images=20, warmup_epochs=0), tmp_path / "a", progress="none"
    )
    vanilla = train(
        tiny(method="vanilla", steps=2, pgd_images=20, warmup_epochs=0), tmp_path / "b", progress="none"
    )
    assert fine.result()["catastrophic_overfitting_step"] is None
    assert "catastrophic_overfitting_step" not in vanilla.result()


def test_runs_and_measures_have_one_pgd_accuracy(tmp_path):
    """The same images, start and steps: the figure of a run is that of the sharpness tool on its checkpoint."""
    config = tiny(method="vanilla", steps=20, epsilon=0.2, pgd_images=60, pgd_steps=4, bn_recalibrate=0)
    folder = train(config, tmp_path / "run", progress="none")
    parts, model = restore(folder.path)
    images = evaluate.fixed_images(parts.test_set, 60)
    report = measure(
        model.eval(), torch.nn.CrossEntropyLoss(), images, ("pgd_accuracy",), epsilon=0.2, pgd_steps=4
    )
    assert 0 < folder.result()["pgd_accuracy"] < 100
    assert report["pgd_accuracy"].value == pytest.approx(folder.result()["pgd_accuracy"])
