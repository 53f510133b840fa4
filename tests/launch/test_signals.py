"""Stop signals reach the rank, whatever handler is installed, and none of its children."""

import json
import os
import subprocess
import sys

from conadv_lab.launch.snapshot import PACKAGE

PROGRAM = """
import json, multiprocessing, os, signal, sys, time
from conadv_lab.launch import signals

came = []

def child(queue):
    queue.put(os.getpid())
    time.sleep(1.5)
    queue.put(len(came))

if __name__ == "__main__":
    signals.take_over(lambda number: came.append(["first", number]))
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    pid = queue.get()
    for number in (signal.SIGUSR2, signal.SIGTERM):
        os.kill(pid, number)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(["second", number]))
    os.kill(os.getpid(), signal.SIGTERM)
    heard = queue.get(timeout=20)
    process.join()
    print(json.dumps([came, heard, process.exitcode]))
"""


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
