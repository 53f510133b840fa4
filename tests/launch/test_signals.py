"""Stop signals reach the rank, whatever handler is installed, and none of its children."""

import json
import os
import signal
import subprocess
import sys

from conadv_lab.launch.snapshot import PACKAGE

FAILING = """
import os, signal, time
from conadv_lab.launch import signals

came = []

def handler(number):
    came.append(number)
    if len(came) == 1:
        raise OSError("no space left on device")

signals.take_over(handler)
for number in (signal.SIGUSR2, signal.SIGTERM):
    os.kill(os.getpid(), number)
    until = time.monotonic() + 5
    while (not came or came[-1] != number) and time.monotonic() < until:
        time.sleep(0.01)
print([int(number) for number in came])
"""

PROGRAM = """
import json, multiprocessing, os, signal, sys, time
from conadv_lab.launch import signals

came = []

def child(queue, go):
    queue.put(os.getpid())
    go.get()
    queue.put(len(came))

def wait_for(count):
    until = time.monotonic() + 30
    while len(came) < count and time.monotonic() < until:
        time.sleep(0.01)

if __name__ == "__main__":
    signals.take_over(lambda number: came.append(["first", number]))
    context = multiprocessing.get_context(sys.argv[1])
    queue, go = context.Queue(), context.Queue()
    process = context.Process(target=child, args=(queue, go))
    process.start()
    pid = queue.get()
    for count, number in enumerate((signal.SIGUSR2, signal.SIGTERM), 1):
        os.kill(pid, number)
        os.kill(os.getpid(), number)
        wait_for(count)  # a handler installed before would be called in place of the first
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(["second", number]))
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(3)
    go.put(None)
    heard = queue.get(timeout=20)
    process.join()
    print(json.dumps([came, heard, process.exitcode]))
"""


def test_a_handler_that_raises_does_not_keep_later_signals_away(tmp_path):
    (tmp_path / "program.py").write_text(FAILING)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    )  # fmt: skip
    assert json.loads(ran.stdout) == [signal.SIGUSR2, signal.SIGTERM]
    assert "OSError: no space left on device" in ran.stderr


def outcome(tmp_path, kind: str) -> list:
    (tmp_path / "program.py").write_text(PROGRAM)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), kind], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    )  # fmt: skip
    return json.loads(ran.stdout)


def test_a_forked_child_does_not_run_the_ranks_handler(tmp_path):
    assert outcome(tmp_path, "fork") == [[["first", 12], ["first", 15], ["second", 15]], 0, 0]


def test_a_spawned_child_does_not_die(tmp_path):
    assert outcome(tmp_path, "spawn") == [[["first", 12], ["first", 15], ["second", 15]], 0, 0]
