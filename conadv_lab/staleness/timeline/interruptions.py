"""The cost of failures and preemptions: work lost since the last checkpoint, restarts, waiting.

Failures are random, at a rate proportional to the number of devices; preemptions have the job's own rate. Neither
happens while the job waits or restarts. A failure resets the job to its last checkpoint; a preempted job saves first.
The expected time without preemptions is Daly's (2006): each segment of length L, checkpoint included, takes
(e^{L/M} − 1)(M + restart) at a mean time M between failures; the interval √(2 · checkpoint · M) is Young's (1974).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conadv_lab.seeds import derived_seed
from conadv_lab.staleness.timeline.cluster import Failures

HOPELESS = 12.0
"""Segments longer than this many mean times between failures are refused: each would need e^12 attempts."""


@dataclass(frozen=True)
class Interruptions:
    """Rates and costs for one job.

    Attributes:
        failure_rate, preemption_rate: per second.
        stretch: seconds of work between checkpoints.
        checkpoint, restart, requeue: seconds.
    """

    failure_rate: float
    preemption_rate: float
    stretch: float
    checkpoint: float
    restart: float
    requeue: float

    @property
    def rate(self) -> float:
        return self.failure_rate + self.preemption_rate


def interruptions(failures: Failures, devices: int, step_seconds: float) -> Interruptions:
    """The interruptions of a job on this many devices.

    Raises:
        ValueError: the job would almost always fail before it reaches a checkpoint.
    """
    rate = 0.0 if failures.device_hours is None else devices / (3600 * failures.device_hours)
    preempted = 0.0 if failures.preemption_hours is None else 1 / (3600 * failures.preemption_hours)
    if failures.checkpoint_every is not None:
        every: float = failures.checkpoint_every
    elif rate > 0:
        every = max(1, round(math.sqrt(2 * failures.checkpoint_s / rate) / step_seconds))
    else:
        every = math.inf
    stretch = every * step_seconds
    if rate * (stretch + failures.checkpoint_s) > HOPELESS:
        raise ValueError(
            f"checkpoint_every is {every}: {stretch + failures.checkpoint_s:.3g} s at a mean time between failures "
            f"of {1 / rate:.3g} s; allowed: an interval that can finish, at most {HOPELESS:g} times that"
        )
    return Interruptions(
        rate, preempted, stretch, failures.checkpoint_s, failures.restart_s, failures.requeue_s
    )


def finish_seconds(work: float, job: Interruptions, *, runs: int, seed: int) -> NDArray[np.float64]:
    """(runs,) seconds until ``work`` seconds of steps are done, each run with its own interruptions."""
    length = job.stretch + job.checkpoint
    count = math.ceil(work / job.stretch) if math.isfinite(job.stretch) else 1
    total = work + count * job.checkpoint
    if job.rate == 0:
        return np.full(runs, total)
    draw = np.random.default_rng(derived_seed(seed, "interruptions"))
    # Seconds of uninterrupted work, wall-clock seconds.
    place, passed = np.zeros(runs), np.zeros(runs)
    going = np.arange(runs)
    while len(going):
        gap = draw.exponential(1 / job.rate, len(going))
        preempted = draw.random(len(going)) * job.rate < job.preemption_rate
        left = total - place[going]
        done = gap >= left
        passed[going] += np.where(done, left, gap)
        reached = place[going] + gap
        saved = np.floor(reached / length) * length if math.isfinite(length) else 0.0
        kept = np.where(preempted, reached, np.maximum(place[going], saved))
        price = job.restart + np.where(preempted, job.checkpoint + job.requeue, 0.0)
        going, kept, price = going[~done], kept[~done], price[~done]
        place[going] = kept
        passed[going] += price
    return passed
