"""Run many jobs at a time, each in its own process."""

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
    """Yield (path, ``work(job, path)``) as jobs finish; they start in the order of ``jobs``.

    With ``processes=1`` everything runs in this process; otherwise ``work`` must be importable by the workers.
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
    """End a worker whose parent was killed: it would keep its run folder locked for results that nobody collects."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
