"""Several ranks of one machine: ``train --ranks N`` starts them, passes signals on, and ends them together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conadv_lab import train

# Ranks of a few milliseconds: what the starting process does with them does not depend on what they are.
SCRIPT = """
import os, signal, sys, time
rank, wait = int(os.environ["RANK"]), time.sleep
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
open(sys.argv[1] + os.environ["RANK"], "w").write(os.environ["MASTER_PORT"] + " " + os.environ["WORLD_SIZE"])
"""


def start(tmp_path: Path, body: str, count: int = 2, alone: bool = False) -> subprocess.Popen:
    """The starting process, in a process of its own."""
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT + body)
    words = [sys.executable, str(script), str(tmp_path / "rank-")]
    program = "import sys; from conadv_lab.launch import ranks; ranks.GRACE = 1; "
    program += f"sys.exit(ranks.start({words!r}, {count}))"
    return subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=alone
    )


def wait_for_ranks(tmp_path: Path, count: int = 2) -> None:
    until = time.monotonic() + 30
    while sum(bool(path.read_text()) for path in tmp_path.glob("rank-*")) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("", 0, ""),
        ("sys.exit(2 if rank else 0)", 2, ""),
        (
            "wait(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "rank 1 was killed by SIGKILL",
        ),
    ],
    ids=["done", "a mistake", "killed"],
)
def test_the_status_is_that_of_the_rank_that_failed_and_no_rank_is_left(tmp_path, body, status, told):
    process = start(tmp_path, body)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert told in err
    meetings = {path.read_text() for path in tmp_path.glob("rank-*")}  # a port and the number of ranks
    assert len(meetings) == 1
    assert meetings.pop().endswith(" 2")


def test_signals_reach_every_rank(tmp_path):
    process = start(tmp_path, "wait(60)")
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_second_interrupt_kills_the_ranks_however_deaf_they_are(tmp_path):
    process = start(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN); wait(60)")
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_one_press_of_a_terminals_keys_is_one_interrupt_of_a_rank(tmp_path):
    """A terminal sends it to the command and to all that share its process group."""
    count = "count = []\nsignal.signal(signal.SIGINT, lambda *_: count.append(1))\n"
    process = start(tmp_path, count + "wait(60) if rank else wait(2); sys.exit(len(count))", alone=True)
    wait_for_ranks(tmp_path)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended may stand in the list until somebody asks for it, or for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_ranks_end_with_the_process_that_started_them(tmp_path):
    process = start(tmp_path, "open(sys.argv[1] + 'pid' + str(rank), 'w').write(str(os.getpid())); wait(60)")
    wait_for_ranks(tmp_path, count=4)
    process.kill()
    process.communicate(timeout=30)
    for file in tmp_path.glob("rank-pid*"):
        until = time.monotonic() + 30
        while lives(int(file.read_text())):
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.mark.slow
def test_the_command_trains_over_ranks_and_prints_once(tmp_path):
    out = tmp_path / "run"
    words = ["digits-conadv", "--train-images", "60", "--global-batch", "20", "--micro-batch", "10", "--steps", "3",
             "--warmup-epochs", "0", "--bn-recalibrate", "0", "--ranks", "2", "--out", str(out)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "conadv_lab.train", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert done.stdout.count("test accuracy") == 1
    assert json.loads((out / "manifest.json").read_text())["ranks"] == 2
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "ranks is 0; allowed: a whole number of at least 1"),
        (["--placement", "ranks"], "attackers is 0; allowed with placement 'ranks': at least 1"),
        (["--attackers", "1"], "attackers is 1; allowed with placement 'serial': 0"),
        (["--placement", "ranks", "--attackers", "1"], "attackers is 1 of 1 rank; allowed: fewer"),
        (["--method", "disadv", "--placement", "ranks"], "allowed for disadv: 'serial'"),
        (["--staleness", "0", "--placement", "ranks"], "allowed for conadv with staleness 0: 'serial'"),
        (
            ["--placement", "stream", "--device", "cpu"],
            "placement is 'stream' on device 'cpu'; allowed: on cuda",
        ),
        (["--placement", "rank"], "'rank'"),
    ],
)
def test_mistakes(tmp_path, capsys, words, message):
    try:
        status = train.main(["digits-conadv", *words, "--out", str(tmp_path / "run")])
    except SystemExit as stop:  # the parser's own
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ranks_that_were_started_already_are_not_started_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(["digits-conadv", "--ranks", "2", "--out", str(tmp_path / "run")]) == 2
    assert "ranks is 2, but this is already one of 3 ranks" in capsys.readouterr().err


def test_a_broken_environment_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert train.main(["digits-conadv", "--out", str(tmp_path / "run")]) == 2
    assert "WORLD_SIZE is 2, but RANK is not set" in capsys.readouterr().err
    assert "MASTER_PORT" not in os.environ
