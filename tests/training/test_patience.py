"""In the first steps ranks wait for one that compiles; later for one that hangs no longer than they say."""

import sys
from pathlib import Path

import pytest

from conadv_lab.launch.ranks import _free_port
from conadv_lab.runs import RunFolder
from tests.training import world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """Where rank 0 of each case has told how it ended; rank 1 of the last one hangs."""
    folder = tmp_path_factory.mktemp("late")
    ports = [str(_free_port("127.0.0.1")) for _ in range(2)]
    first, last = world.processes([sys.executable, "-m", "tests.training.late_ranks", str(folder), *ports], 2)
    try:
        told, _ = first.communicate(timeout=240)
    finally:
        last.kill()
        last.communicate()
    assert first.returncode == 0, told
    return folder


def test_an_attacker_that_is_late_in_the_first_step_is_waited_for(ended):
    assert (ended / "attacker-0.txt").read_text() == "finished"


def test_so_is_a_trainer_but_one_that_hangs_later_is_not(ended):
    assert "another rank has failed or does not answer" in (ended / "trainer-0.txt").read_text()
    assert RunFolder(ended / "trainer").committed() == []
    assert [line["step"] for line in RunFolder(ended / "trainer").metrics()] == [0]
