"""Over several ranks the result is that of one rank with the same ghost groups, whoever made which part of a step."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.config import Config, resolved
from conadv_lab.data.loader import Batch
from conadv_lab.data.lookahead import lookahead
from conadv_lab.recipes import digits
from conadv_lab.runs import RunFolder
from conadv_lab.training.evaluate import evaluate
from conadv_lab.training.loop import prepare, train
from conadv_lab.training.restore import restore
from tests.training import world

STEPS = 20
SYNC = {"batch_norm": "sync", "micro_batch": None}
BESIDE = {"method": "conadv", "placement": "ranks", "attackers": 1}
SINGLE = {"precision": "float32"}

# (ranks, changes of the config); of three ranks with an attacker two train, so that they are compared with two.
CASES: dict[str, tuple[int, dict]] = {
    "vanilla": (2, {"method": "vanilla"}),
    "disadv": (2, {"method": "disadv"}),
    "conadv-1": (
        2,
        {"method": "conadv", "probe_every": 5, "evaluate_every": 7, "bn_recalibrate": 60, "ema": 0.9},
    ),
    "conadv-3": (2, {"method": "conadv", "staleness": 3, "micro_batch": 7}),
    "conadv-clean": (2, {"method": "conadv", "staleness": 2, "first": "clean"}),
    "recycled": (2, {"method": "recycled"}),
    "noise": (2, {"method": "noise"}),
    "copy": (2, {"method": "copy"}),
    "recycled-equal": (2, {"method": "recycled-equal", "micro_batch": 5}),
    "noise-equal": (2, {"method": "noise-equal", "micro_batch": 8}),
    "copy-equal": (2, {"method": "copy-equal", "micro_batch": 8}),
    "advprop": (2, {"method": "advprop", "staleness": 1, "attack_steps": 2, "attack_target": "random"}),
    "free-at": (2, {"method": "free-at", "replays": 3, "micro_batch": 7}),
    "sync-fast-advprop": (2, {"method": "fast-advprop", **SYNC}),
    "sync-fgsm-rs": (2, {"method": "fgsm-rs", "staleness": 2, **SYNC}),
    "lars": (2, {"method": "conadv", "optimizer": "lars", "lr": 2.0}),
    "autowu": (2, {"method": "conadv", "schedule": "autowu", "first_lr": 1e-3}),
    "clipped": (2, {"method": "vanilla", "adaptive_clipping": 0.01}),
    "sync-vanilla": (2, {"method": "vanilla", **SYNC}),
    "sync-disadv": (2, {"method": "disadv", **SYNC}),
    "sync-conadv": (2, {"method": "conadv", "staleness": 3, **SYNC}),
    "sync-recycled": (2, {"method": "recycled", **SYNC}),
    "sync-recycled-equal": (2, {"method": "recycled-equal", **SYNC, "micro_batch": 6}),
    "attacker": (2, {"staleness": 2, **BESIDE}),
    "single-vanilla": (2, {"method": "vanilla", "micro_batch": 7, **SINGLE}),
    "single-conadv-1": (2, {"method": "conadv", **SINGLE}),
    "single-conadv-3": (2, {"method": "conadv", "staleness": 3, "micro_batch": 7, **SINGLE}),
    "single-conadv-clean": (2, {"method": "conadv", "staleness": 2, "first": "clean", **SINGLE}),
    "single-sync": (2, {"method": "conadv", **SYNC, **SINGLE}),
    "single-recycled": (2, {"method": "recycled", **SINGLE}),
    "single-free-at": (2, {"method": "free-at", "replays": 3, **SINGLE}),
    "three": (3, {"method": "conadv", "micro_batch": 7}),
    "three-sync": (3, {"method": "recycled", **SYNC, "micro_batch": 11}),
    "attacker-1": (3, {"staleness": 1, **BESIDE}),
    "attacker-l2": (3, {"staleness": 1, "norm": "l2", "epsilon": 0.5, **BESIDE}),
    "attackers": (3, {"staleness": 3, **BESIDE, "attackers": 2, "micro_batch": 7}),
    "beside-1": (3, {"staleness": 1, **BESIDE, **SINGLE}),
    "beside-3": (3, {"staleness": 3, **BESIDE, "micro_batch": 7, **SINGLE}),
    "beside-clean": (3, {"staleness": 2, "first": "clean", **BESIDE, **SINGLE}),
    "beside-sync": (3, {"staleness": 1, **BESIDE, **SYNC, **SINGLE}),
}
# Each is disturbed twice at other places, and must end as the undisturbed one.
RESUMED = {
    "again-conadv-3": (2, "single-conadv-3"),
    "again-recycled": (2, "single-recycled"),
    "again-free-at": (2, "single-free-at"),
    "again-sync": (2, "single-sync"),
    "again-beside-3": (3, "beside-3"),
    "again-autowu": (2, "autowu"),
}
SERIAL = {
    "beside-1": "single-conadv-1",
    "beside-3": "single-conadv-3",
    "beside-clean": "single-conadv-clean",
    "beside-sync": "single-sync",
}


def config(**changes) -> Config:
    """90 images, 32 a step in groups of 16, so that steps begin in one epoch and end in the next."""
    recipe = digits.vanilla().replace(
        model=f"{world.__file__}:network",
        train_images=90,
        global_batch=32,
        micro_batch=16,
        steps=STEPS,
        warmup_epochs=0,
        bn_recalibrate=0,
        log_every=1,
        checkpoint_every=1000,
        threads=1,
        precision="float64",
        channels_last=False,
        crop=1,
    )
    return recipe.replace(**changes)


def alone(changes: dict) -> Config:
    """The same for one rank: whole groups, and nobody to attack beside it."""
    return config(**{k: v for k, v in changes.items() if k not in ("placement", "attackers", "batch_norm")})


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # worlds of two and three processes
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folders of all cases, trained over ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    elsewhere(folder)
    worlds = [world.started(count, cases(folder, count), folder) for count in (2, 3)]
    assert [one.wait() for one in worlds] == [[0, 0], [0, 0, -signal.SIGKILL]]
    return folder


def cases(folder: Path, count: int) -> list[dict]:
    found = [world.case(folder / name, config(**more)) for name, (n, more) in CASES.items() if n == count]
    for name, (n, undisturbed) in RESUMED.items():
        if n == count:
            disturbed = config(**CASES[undisturbed][1]).replace(checkpoint_every=3)
            ends: list[dict[str, int]] = [{"killed": 5}, {"signalled": 10}, {"killed": 17}, {}]
            found += [world.case(folder / name, disturbed, **end) for end in ends]
    if count == 2:
        moved = config(**CASES["conadv-3"][1]).replace(checkpoint_every=5)
        found += [
            world.case(folder / "from-one-to-two", moved),
            world.case(folder / "from-two-to-one", moved, killed=8),
            world.case(folder / "from-serial-to-beside", config(staleness=2, **BESIDE, **SINGLE)),
            world.case(folder / "stopped", config(), signalled=10),
            *(world.case(folder / f"stopped-{n}", config(), signalled=n) for n in (STEPS - 2, STEPS - 1)),
            world.case(folder / "one-group", config(micro_batch=None)),
            world.case(folder / "nobody-trains", config(**BESIDE).replace(attackers=2)),
            world.case(folder / "blind", config(), blind=1),
            world.case(folder / "too-fast", config(method="vanilla", lr=1e200)),
            world.case(folder / "full", config(), full=7),
        ]
    else:
        found.append(world.case(folder / "died", config(**BESIDE), died=7))
    return found


def elsewhere(folder: Path) -> None:
    """One rank begins runs that two will end."""
    begun = {
        "from-one-to-two": config(**CASES["conadv-3"][1]).replace(checkpoint_every=5),
        "from-serial-to-beside": config(method="conadv", staleness=2, **SINGLE).replace(checkpoint_every=5),
    }
    for name, moved in begun.items():
        run = prepare(moved, folder / name, progress="none")
        assert run is not None
        with run.claim, run.saver:  # this process lives on, and two others will want the folder
            run.start()
            while run.step < 8:
                run.train_step()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(RunFolder(path).committed()[0])[1]["model"]


def distance(one: Path, two: Path) -> float:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("single", "beside"))])
def test_parameters_are_those_of_one_rank_with_the_same_groups(name, runs, tmp_path):
    """Weights and running statistics after 20 steps in float64, micro-batches accumulated by one rank."""
    one = train(alone(CASES[name][1]), tmp_path / "alone", progress="none")
    assert distance(one.path, runs / name) < 1e-9
    for line, same in zip(one.metrics(), RunFolder(runs / name).metrics(), strict=True):
        assert line.keys() == same.keys()
        timeless = line.keys() - {"images_per_second"}
        assert all(line[key] == same[key] or abs(line[key] - same[key]) < 1e-9 for key in timeless)
    assert one.result().keys() == RunFolder(runs / name).result().keys()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("single")])
def test_in_float32_they_agree_to_rounding(name, runs, tmp_path):
    one = train(alone(CASES[name][1]), tmp_path / "alone", progress="none")
    assert distance(one.path, runs / name) < 1e-4


@pytest.mark.parametrize("name", SERIAL)
def test_attackers_change_no_bit(name, runs):
    """The same two trainers, the attack before the step or on a third rank: equal in float32."""
    assert (
        RunFolder(runs / name).result()["parameters_sha256"]
        == RunFolder(runs / SERIAL[name]).result()["parameters_sha256"]
    )
    assert distance(runs / name, runs / SERIAL[name]) == 0


def test_methods_and_groups_make_a_difference(runs):
    """The comparisons could not fail if all runs were alike."""
    for one, two in (("vanilla", "conadv-1"), ("conadv-1", "conadv-3"), ("recycled", "sync-recycled")):
        assert distance(runs / one, runs / two) > 1e-3


def test_only_the_config_tells_how_a_step_is_shared(runs):
    """The number of ranks is in the manifest, and the config is what one rank would have."""
    assert RunFolder(runs / "three").config() == resolved(alone(CASES["three"][1]))
    told = RunFolder(runs / "attackers").manifest()
    assert (told["ranks"], told["attackers"], told["placement"]) == (3, 2, "ranks")
    parts, judged = restore(runs / "attackers", trust=True)
    assert evaluate(parts, judged)["test_loss"] == RunFolder(runs / "attackers").result()["test_loss"]


@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_stopped_ranks_resume_bitwise(name, runs):
    """All are killed twice, and stop once after the same step although one of them alone got the signal."""
    undisturbed = RESUMED[name][1]
    one, other = RunFolder(runs / name), RunFolder(runs / undisturbed)
    assert one.result()["parameters_sha256"] == other.result()["parameters_sha256"]
    assert distance(one.path, other.path) == 0
    assert [line["step"] for line in one.metrics()] == list(range(STEPS))
    assert [line["loss"] for line in one.metrics()] == [line["loss"] for line in other.metrics()]
    assert not list(one.path.glob("checkpoints/.partial-*"))


def test_a_stop_request_of_one_rank_stops_all_after_the_same_step(runs, tmp_path):
    """It comes in step 10, and ranks tell one another a step later."""
    for rank in (0, 1):
        assert world.ended(runs / "stopped", rank).startswith("StoppedOnRequest")
    assert "a signal to another rank after step 12" in world.ended(runs / "stopped", 0)
    assert "SIGUSR2 after step 12" in world.ended(runs / "stopped", 1)


@pytest.mark.parametrize("step", [STEPS - 2, STEPS - 1])
def test_a_stop_request_that_comes_too_late_to_be_told_leaves_a_finished_run(step, runs):
    assert RunFolder(runs / f"stopped-{step}").result()["steps"] == STEPS
    assert not (runs / f"stopped-{step}-0.txt").exists()


def test_a_checkpoint_belongs_to_no_number_of_ranks(runs):
    """Pending perturbations are kept by global group: begun by one rank and ended by two, and the other way round."""
    train(
        RunFolder(runs / "from-two-to-one").config(), runs / "from-two-to-one", resume=True, progress="none"
    )
    for name in ("from-one-to-two", "from-two-to-one"):
        assert distance(runs / name, runs / "conadv-3") < 1e-9
        assert [line["step"] for line in RunFolder(runs / name).metrics()] == list(range(STEPS))


def test_an_attack_may_go_on_beside_the_step(runs, tmp_path):
    """One rank trains all along; of two, the other one attacks from step 5 on, and no bit changes."""
    whole = train(config(method="conadv", staleness=2, **SINGLE), tmp_path / "alone", progress="none")
    assert distance(whole.path, runs / "from-serial-to-beside") == 0
    assert RunFolder(runs / "from-serial-to-beside").config().method.placement == "ranks"


def test_mistakes_are_told_on_every_rank_and_nothing_is_written(runs):
    for rank in (0, 1):
        told = world.ended(runs / "one-group", rank)
        assert "ValueError: 2 ranks cannot share a step of 1 micro-batches" in told
        assert "allowed: a micro_batch of at most 16, fewer ranks, or batch_norm sync" in told
        assert "attackers is 2 of 2 ranks; allowed: fewer" in world.ended(runs / "nobody-trains", rank)
    assert not (runs / "one-group").exists()
    assert not (runs / "nobody-trains").exists()


def test_what_one_rank_alone_finds_wrong_is_told_by_all_and_nobody_waits_for_ever(runs):
    for rank in (0, 1):
        assert world.ended(runs / "blind", rank) == "ValueError: this node has no GPU"
    assert not (runs / "blind").exists()


def test_a_loss_that_is_no_number_ends_all_ranks_with_the_same_sentence(runs):
    told = [world.ended(runs / "too-fast", rank) for rank in (0, 1)]
    assert told[0].startswith("NotFinite: the clean loss is")
    assert told[0] == told[1]


def test_a_full_disk_or_a_dead_rank_ends_all(runs):
    assert "No space left" in world.ended(runs / "full", 0)
    assert "AnotherRankFailed: rank 1 stops because another rank has failed" in world.ended(runs / "full", 1)
    for rank in (0, 1):
        assert f"rank {rank} stops because another rank has failed" in world.ended(runs / "died", rank)


def test_somebody_elses_data_parallel_loop_trains_as_one_process_with_all_batches(runs):
    """The attack goes past DistributedDataParallel; the average over ranks is that of one process's micro-batches."""
    model, method, optimizer = world.strangers_parts()
    streams = [list(lookahead(world.strangers_batches(rank), steps=12, ahead=2)) for rank in (0, 1)]
    for both in zip(*streams, strict=True):

        def halves(number: int, both=both) -> list[Batch]:
            batches = [batch for step in both for batch in step.fetch(number)]
            return [replace(batch, share=batch.share / 2) for batch in batches]

        def counts(number: int, both=both) -> list[int]:
            return [count for step in both for count in step.counts(number)]

        method.backward(model, replace(both[0], fetch=halves, counts=counts), torch.nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    theirs = torch.load(runs / "strangers-2.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert (value.double() - theirs[name].double()).abs().max() < 1e-9, name
