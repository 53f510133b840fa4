"""Commands whose output nobody reads to its end."""

import os
import subprocess
import sys

import pytest

from conadv_lab.pipes import _Unheard


@pytest.mark.parametrize("command", [["conadv_lab.train", "--list"], ["conadv_lab.submit", "--help"]])
def test_a_reader_that_leaves_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", *command], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_is_written_until_the_reader_leaves_and_dropped_from_then_on():
    reading, writing = os.pipe()
    stream = _Unheard(open(writing, "w"))  # noqa: SIM115 - its buffer is what the pipe breaks under
    stream.write("heard\n")
    stream.flush()
    assert os.read(reading, 100) == b"heard\n"
    os.close(reading)
    for _ in range(3):
        stream.write("unheard" * 10_000)
        stream.flush()
    stream.close()
