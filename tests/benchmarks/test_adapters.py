"""The adapters' benchmark: loops that wait after each step, and the same weights with and without the adapter."""

import pytest

from benchmarks import adapters
from benchmarks.adapters import LOOPS, Stepped, measure

NEEDED = {"Lightning": "lightning", "Trainer": "transformers", "Accelerate": "accelerate"}


def test_a_loop_takes_one_step_a_call_and_ends():
    done = []

    def loop(wait):
        while True:
            done.append(len(done))
            wait()

    step = Stepped(loop)
    for number in range(3):
        step()
        assert done == list(range(number + 1))
    step.end()
    assert done == [0, 1, 2]


def test_what_a_loop_raises_is_raised():
    def loop(wait):
        wait()
        raise ValueError("in the loop")

    step = Stepped(loop)
    step()
    with pytest.raises(ValueError, match="in the loop"):
        step()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_both_loops_of_a_library_are_timed(name, monkeypatch):
    pytest.importorskip(NEEDED[name], reason="the extra [adapters] is not installed")
    monkeypatch.setattr(adapters, "LOOPS", {name: LOOPS[name]})
    monkeypatch.setattr(adapters, "IMAGES", 16)
    (row,) = measure(batch=4, rounds=2)
    assert (row.name, row.peer, row.unit) == (name, f"plain {name}", "ms")
    assert row.value > 0
    assert row.ratio is not None
