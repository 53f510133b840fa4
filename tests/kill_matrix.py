"""Runs are disturbed at random moments; each must end bitwise as the undisturbed one, with every step logged once.

    python -m tests.kill_matrix [--cases 100] [--ranks 1 2] [--seed 0]

A case is a method, a number of ranks and up to three disturbances: USR2, TERM or KILL, while the run starts, takes
steps, saves or evaluates, sent to one of its ranks; then it is resumed until it is done. Every rank is a process
of its own that runs the command ``train``; they are forked from a server that has torch loaded already.
"""

import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from conadv_lab import checkpoints, train
from conadv_lab.cli import asked
from conadv_lab.runs import RunFolder
from conadv_lab.training import loop

METHODS = ("vanilla", "conadv", "recycled", "asyncsam", "extrap")
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGKILL)
MOMENTS = ("starting", "stepping", "saving", "evaluating")
STEPS = 30
STOPPED = 75
WORDS = ["digits-conadv", "--train-images", "90", "--global-batch", "16", "--micro-batch", "8", "--steps", str(STEPS),
         "--log-every", "1", "--checkpoint-every", "4", "--evaluate-every", "7", "--warmup-epochs", "0",
         "--threads", "1"]  # fmt: skip
PATIENCE = 90
GRACE = 10


@dataclass(frozen=True)
class Disturbance:
    """A signal, the moment it comes and, of several such moments, which one: a number from 0 to 1."""

    number: signal.Signals
    moment: str
    when: float
    rank: int

    def __str__(self) -> str:
        return (
            f"{self.number.name.removeprefix('SIG')} while {self.moment} ({self.when:.2f}, rank {self.rank})"
        )


def disturbed_run(method: str, ranks: int, disturbances: Sequence[Disturbance], out: Path) -> dict[str, Any]:
    """The result of a run that was disturbed and resumed until it was done.

    Raises:
        RuntimeError: it ended otherwise than a disturbed run may, or did not end.
    """
    for disturbance in disturbances:
        _stretch(method, ranks, out, disturbance)
    _stretch(method, ranks, out, None)
    folder = RunFolder(out)
    steps = [line["step"] for line in folder.metrics()]
    if steps != list(range(STEPS)):
        raise RuntimeError(f"metrics.jsonl has the steps {steps}")
    if left := list(folder.checkpoints.glob(".partial-*")):
        raise RuntimeError(f"half-written checkpoints are left: {left}")
    result = folder.result()
    assert result is not None
    return result


def _stretch(method: str, ranks: int, out: Path, disturbance: Disturbance | None) -> None:
    """Run until it ends, whatever ends it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["conadv_lab.train", "conadv_lab.training.loop"])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    words = [*WORDS, "--method", method, "--out", str(out), "--resume"]
    log = out.with_suffix(".log")
    processes = []
    for rank in range(ranks):
        environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        own = disturbance if disturbance is not None and disturbance.rank == rank else None
        processes.append(context.Process(target=_rank, args=(words, environment, own, str(log))))
    for process in processes:
        process.start()
    try:
        if disturbance is not None:
            _disturb(processes[disturbance.rank], disturbance, RunFolder(out))
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    done = RunFolder(out).result() is not None
    if not _is_fair_end([process.exitcode for process in processes], disturbance, done):
        ended = [process.exitcode for process in processes]
        raise RuntimeError(f"the ranks ended with {ended}; the log ends: {log.read_text()[-1500:]}")


def _rank(words: list[str], environment: dict[str, str], disturbance: Disturbance | None, log: str) -> None:
    """What the process of a rank does: the command ``train``, with a trap where the disturbance needs one."""
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if disturbance is not None and disturbance.moment in ("saving", "evaluating"):
        _set_trap(disturbance)
    sys.exit(train.main(words))


def _set_trap(disturbance: Disturbance) -> None:
    """Make this process send itself the signal in the middle of a save or of an evaluation."""
    spring = _at_call(1 + int(disturbance.when * 4), lambda: os.kill(os.getpid(), disturbance.number))
    if disturbance.moment == "evaluating":
        evaluate = loop.evaluate

        def trapped(*arguments: Any) -> dict[str, float]:
            spring()
            return evaluate(*arguments)

        loop.evaluate = trapped
    else:
        write = checkpoints.write_hashed

        def half_written(path: Path, state: dict[str, Any]) -> str:
            write(path, state)
            os.truncate(path, path.stat().st_size // 2)
            spring()
            return write(path, state)

        checkpoints.write_hashed = half_written


def _at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    calls = 0

    def spring() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            act()

    return spring


def _disturb(process: ForkServerProcess, disturbance: Disturbance, folder: RunFolder) -> None:
    """Send the signal from here, where its moment is seen from here."""
    if disturbance.moment == "starting":
        time.sleep(disturbance.when)
    elif disturbance.moment == "stepping":
        done = len(folder.metrics())
        wanted = done + 1 + int(disturbance.when * (STEPS - done - 1))
        until = time.monotonic() + PATIENCE
        while process.is_alive() and len(folder.metrics()) < wanted and time.monotonic() < until:
            time.sleep(0.001)
    else:
        return
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, disturbance.number)


def _wait(processes: Sequence[ForkServerProcess]) -> None:
    """Return once all have ended. As a launcher does, end those that outlive a failed rank for more than `GRACE`."""
    until = time.monotonic() + PATIENCE
    one_failed = False
    while any(process.is_alive() for process in processes):
        if not one_failed and any(process.exitcode for process in processes):
            one_failed, until = True, min(until, time.monotonic() + GRACE)
        if time.monotonic() > until:
            if one_failed:
                return
            raise RuntimeError(f"a rank still runs {PATIENCE} s later")
        time.sleep(0.01)


def _is_fair_end(codes: list[int | None], disturbance: Disturbance | None, done: bool) -> bool:
    """A run that nobody disturbs ends with 0. USR2 and TERM end it with 75; or at once, before and after it trains."""
    if disturbance is None:
        return all(code == 0 for code in codes)
    own = codes[disturbance.rank]
    if disturbance.number == signal.SIGKILL:
        return own in (0, -signal.SIGKILL)
    at_once = own == -disturbance.number and (done or disturbance.moment == "starting")
    return own in (0, STOPPED) or at_once


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cases(count: int, ranks: Sequence[int], seed: int) -> list[tuple[str, int, list[Disturbance]]]:
    """Random cases in which every method, number of ranks, signal and moment comes about equally often.

    A round, as many as `make test-all` takes, begins once with each moment of each method.
    """
    draw = random.Random(seed)
    made = []
    a_round = len(METHODS) * len(MOMENTS)
    for number in range(count):
        world = ranks[number // len(METHODS) % len(ranks)]
        disturbances = []
        for extra in range(draw.choice((1, 2, 3))):
            kind = SIGNALS[(number + number // len(METHODS) + number // a_round + extra) % len(SIGNALS)]
            moment = (
                MOMENTS[(number + number // a_round) % len(MOMENTS)] if extra == 0 else draw.choice(MOMENTS)
            )
            rank = 0 if moment == "saving" else draw.randrange(world)  # only the first rank saves
            disturbances.append(Disturbance(kind, moment, draw.random(), rank))
        made.append((METHODS[number % len(METHODS)], world, disturbances))
    return made


@dataclass(frozen=True)
class Options:
    cases: int = 100
    ranks: tuple[int, ...] = (1, 2)
    seed: int = 0


def main(words: Sequence[str] | None = None) -> int:
    options = asked(Options, words, "tests.kill_matrix", __doc__)
    scratch = Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    undisturbed: dict[tuple[str, int], str] = {}
    failed = 0
    for number, (method, ranks, disturbances) in enumerate(cases(options.cases, options.ranks, options.seed)):
        key = method, ranks
        if key not in undisturbed:
            whole = disturbed_run(method, ranks, [], scratch / f"undisturbed-{method}-{ranks}")
            undisturbed[key] = whole["parameters_sha256"]
        told = f"{number:>4} {method:<9} {ranks} ranks: {', then '.join(map(str, disturbances))}"
        try:
            result = disturbed_run(method, ranks, disturbances, scratch / f"{number}")
        except RuntimeError as error:
            verdict = str(error)
        else:
            verdict = "bitwise" if result["parameters_sha256"] == undisturbed[key] else "other parameters"
        failed += verdict != "bitwise"
        print(f"{told}: {verdict}", flush=True)
    print(f"{options.cases - failed} of {options.cases} bitwise as undisturbed, every step logged once")
    if failed:
        print(f"the runs are in {scratch}")
    else:
        shutil.rmtree(scratch)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
