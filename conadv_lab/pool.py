"""Many runs at a time, a process each."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")


def worked(
    work: Callable[[Job, Path], Any], jobs: Mapping[Path, Job], processes: int
) -> Iterator[tuple[Path, Any]]:
    """Every path with what ``work(job, path)`` returned, as soon as it has; begun in the order of ``jobs``.

    With one process all is done in this one. ``work`` must be importable by another process otherwise.
    """
    if processes == 1:
        for path, job in jobs.items():
            yield path, work(job, path)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        futures = {pool.submit(work, job, path): path for path, job in jobs.items()}
        for done in as_completed(futures):
            yield futures[done], done.result()


def _end_with_parent() -> None:
    """Nobody would take the results of a pool whose parent was killed, and the next one waits for its folders."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
