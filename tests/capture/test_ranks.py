"""Captured steps over two ranks, without a GPU: recorded segments with real messages between them are the step."""

import json
from pathlib import Path

import pytest

from tests.capture.ranks import STOP
from tests.training import world
from tests.training.test_ranks import SINGLE, SYNC, config

STEPS = 26
METHODS = ("vanilla", "disadv", "conadv", "recycled", "sam")
OPTIMIZERS = {"sgd": {}, "lars": {"optimizer": "lars", "lr": 2.0}}
CASES = {
    **{f"{m}-{o}": {"method": m, **more} for m in METHODS for o, more in OPTIMIZERS.items()},
    # Rank 0 has three micro-batches, rank 1 has two.
    "uneven": {"method": "conadv", "staleness": 3, "micro_batch": 7, "ema": 0.9},
    "conadv-sam": {"method": "conadv-sam"},
    "recycled-equal": {"method": "recycled-equal", "micro_batch": 8},
}
MANY = {"method": "conadv", "micro_batch": 1}
FALLBACKS = {
    "one-cannot": ({"method": "conadv"}, {"reason": "rank 1 has a reason"}),
    "one-cannot-on": ({"method": "conadv", "capture": "on"}, {"reason": "rank 1 has a reason"}),
    "sync": ({"method": "conadv", **SYNC}, {}),
    "sync-on": ({"method": "conadv", "capture": "on", **SYNC}, {}),
    "many": (MANY, {}),
    "late": ({"method": "conadv"}, {"backend": "too small"}),
    "late-on": ({"method": "conadv", "capture": "on"}, {"backend": "too small"}),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a world of two processes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")

    def changed(changes: dict) -> dict:
        return config(**SINGLE).replace(steps=STEPS, **changes).to_dict()

    cases = [{"kind": "case", "name": name, "config": changed(more)} for name, more in CASES.items()]
    cases += [
        {"kind": "fallback", "name": name, "config": changed(more), "own": own}
        for name, (more, own) in FALLBACKS.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [world.sys.executable, "-m", "tests.capture.ranks", str(folder)]
    world.World(world.processes(command, 2)).wait()
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_replayed_segments_are_the_step(name, found):
    """Bit for bit the parameters of a run whose ranks reduce during the last backward; also after a resume."""
    for one in (ranks[name] for ranks in found):
        assert one["differ"] == [[], []]
        assert one["overlaps"] == [True, False]
        assert min(one["replayed"]) >= 4


@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_a_kind_run_the_same_operators_on_the_same_tensors(name, found):
    for one in (ranks[name] for ranks in found):
        assert one["unlike"] == []
        assert one["operators"] > 50


def test_a_step_is_broken_for_each_message(found):
    """For batch norm's averages and for the gradients; SAM's ascent gradient is summed too."""
    (one, other) = ({name: ranks[name]["segments"] for name in CASES} for ranks in found)
    assert one == other
    assert {one[f"{name}-sgd"] for name in ("vanilla", "disadv", "conadv", "recycled")} == {3}
    assert one["sam-sgd"] == 5


@pytest.mark.parametrize("name", ["one-cannot", "sync", "many"])
def test_no_rank_captures_where_one_cannot(name, found):
    for one in (ranks[name] for ranks in found):
        assert (one["captures"], one["overlaps"], one["differ"], one["replayed"]) == (False, True, [], [])


def test_on_is_refused_on_all_ranks_with_the_reason(found):
    for one in found:
        for name, why in (
            ("one-cannot-on", "rank 1 has a reason"),
            ("sync-on", "batch norm is synchronised over ranks within each pass"),
        ):
            assert one[name] == {
                "said": f"capture is 'on', but {why}; allowed: 'auto', 'off'", "exists": False
            }  # fmt: skip


def test_a_rank_that_cannot_capture_later_makes_all_run_eagerly(found):
    """Until they know, the others replay: the messages are the same."""
    for one in (ranks["late"] for ranks in found):
        assert (one["captures"], one["overlaps"], one["differ"]) == (False, True, [])
    assert found[0]["late"]["replayed"][0] > 0


def test_no_rank_hangs_where_another_must_capture_but_cannot(found):
    assert found[1]["late-on"]["said"].startswith("capture is 'on', but there is not enough GPU memory")
    assert "another rank has failed" in found[0]["late-on"]["failed"]


def test_the_run_stopped_while_steps_were_replayed():
    assert STOP > 10 + 3
