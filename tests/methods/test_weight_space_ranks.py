"""Moved weights over two ranks: the result is that of one process, and a run that is killed goes on bitwise."""

import pytest

from conadv_lab.runs import RunFolder
from conadv_lab.training.loop import train
from tests.training import world
from tests.training.test_ranks import SYNC, alone, config, distance

CASES = {
    "sam": {"method": "sam", "probe_every": 5},
    "looksam": {"method": "looksam", "look_every": 3, "look_alpha": 0.7},
    "asyncsam": {"method": "asyncsam", "staleness": 2, "probe_every": 5},
    "msam": {"method": "msam", "optimizer": "lars", "lr": 2.0},
    "sampa": {"method": "sampa"},
    "extrap": {"method": "extrap", "perturbation": "micro-batch"},
    "conadv-sam": {"method": "conadv-sam"},
    "recycled-msam": {"method": "recycled-msam"},
    "sync-sam": {"method": "sam", **SYNC},
}
RESUMED = {"again-asyncsam": "asyncsam", "again-extrap": "extrap"}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # worlds of two and three processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cases = [world.case(folder / name, config(**changes)) for name, changes in CASES.items()]
    for name, undisturbed in RESUMED.items():
        disturbed = config(**CASES[undisturbed]).replace(checkpoint_every=3)
        cases += [
            world.case(folder / name, disturbed, **end) for end in ({"killed": 8}, {"signalled": 13}, {})
        ]
    workers = config(method="extrap")
    cases += [
        world.case(folder / "workers", workers),
        world.case(folder / "slices", config(method="sam", perturbation="micro-batch", **SYNC)),
    ]
    assert world.started(2, cases, folder).wait() == [0, 0]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_with_the_same_groups(name, runs, tmp_path):
    one = train(alone(CASES[name]), tmp_path / "alone", progress="none")
    assert distance(one.path, runs / name) < 1e-9
    for line, same in zip(one.metrics(), RunFolder(runs / name).metrics(), strict=True):
        assert line.keys() == same.keys()
        assert all(abs(line[key] - same[key]) < 1e-9 for key in line.keys() - {"images_per_second"})


def test_a_worker_of_extrap_is_a_rank(runs, tmp_path):
    """Of two micro-batches each rank has one, so that ranks are workers as micro-batches are."""
    assert distance(runs / "workers", runs / "extrap") < 1e-9
    one = train(alone({"method": "extrap"}), tmp_path / "alone", progress="none")
    assert distance(one.path, runs / "workers") > 1e-4


@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_stopped_ranks_resume_bitwise(name, runs):
    one, other = RunFolder(runs / name), RunFolder(runs / RESUMED[name])
    assert one.result()["parameters_sha256"] == other.result()["parameters_sha256"]
    assert [line["loss"] for line in one.metrics()] == [line["loss"] for line in other.metrics()]


def test_slices_of_a_micro_batch_have_no_gradient_of_their_own(runs):
    assert "perturbation is 'micro-batch'; allowed with batch_norm 'sync'" in world.ended(runs / "slices", 1)
    assert not (runs / "slices").exists()
