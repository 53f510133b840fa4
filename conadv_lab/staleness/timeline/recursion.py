"""When each step of a run starts and ends on a cluster, and how stale each worker's perturbation is.

Trainers wait for each other in the all-reduce, so a step ends at the maximum over trainers of (own start + own
compute, all-reduces behind it): a max-plus recursion over steps, vectorised over devices. With placement ``ranks`` an
attacker starts on the next batch when it is free and the weights from τ steps before have arrived, uses the newest
weights that have arrived, and a trainer starts a step when its images have arrived. So a batch's *effective* τ is at
most τ, and lower if attackers are late.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conadv_lab.mistakes import require
from conadv_lab.staleness.timeline.cluster import Stragglers
from conadv_lab.staleness.timeline.passes import Span
from conadv_lab.staleness.timeline.step_times import StepTimes, shared_attackers
from conadv_lab.staleness.timeline.stragglers import factors

SHOWN_STEPS = 8
"""Number of steps whose starts and factors are recorded per device, for charts."""
Times = NDArray[np.float64]


@dataclass(frozen=True)
class Timeline:
    """The simulated steps.

    Attributes:
        starts: (steps,) seconds at which each step's weights are available.
        ends: (steps,) seconds at which the step's optimiser is done.
        busy: (devices,) seconds of compute.
        trace: (steps, trainers) int8, the effective τ of each worker's images; the largest, if several attackers
            contributed.
        shown_starts, shown_factors: (few steps, devices), when each device started its passes, and its factor.
    """

    times: StepTimes
    starts: Times
    ends: Times
    busy: Times
    trace: NDArray[np.int8]
    shown_starts: Times
    shown_factors: Times

    @property
    def makespan(self) -> float:
        """Seconds from the start to the end of the last step."""
        return float(self.ends[-1])

    @property
    def step_seconds(self) -> Times:
        """(steps,) seconds since the end of the previous step."""
        return np.diff(self.ends, prepend=0.0)

    @property
    def settled(self) -> float:
        """Mean step time in steady state: without the first tenth."""
        skip = len(self.ends) // 10
        begin = self.ends[skip - 1] if skip else 0.0
        return float((self.ends[-1] - begin) / (len(self.ends) - skip))

    @property
    def utilisation(self) -> float:
        """Fraction of all devices' time spent computing."""
        return float(self.busy.sum() / (self.times.devices * self.makespan))

    def tau_counts(self) -> dict[int, float]:
        """Fraction of (step, worker) pairs at each effective τ."""
        sample = self.trace[:, :1] if self.trace.strides == (0, 0) else self.trace
        values, counts = np.unique(sample, return_counts=True)
        return {int(v): float(c / sample.size) for v, c in zip(values, counts, strict=True)}

    def tau_of_workers(self) -> Times:
        """(trainers, τ + 1) fraction of each worker's steps at each effective τ."""
        return np.stack([(self.trace == tau).mean(axis=0) for tau in range(self.times.staleness + 1)], axis=1)

    def spans(self, steps: int = 4) -> list[dict[str, Any]]:
        """What each device computes in the first steps: rows of device, role, lane of lanes, what, step, start, end."""
        rows: list[dict[str, Any]] = []
        attacks = (Span(0, 1, self.times.what, 0.0, self.times.side),)
        for step in range(min(steps, len(self.shown_starts))):
            for device in range(self.times.devices):
                start, factor = self.shown_starts[step, device], self.shown_factors[step, device]
                trains = device < self.times.trainers
                rows += [
                    {"device": device, "role": "trainer" if trains else "attacker", "lane": s.lane, "lanes": s.lanes,
                     "what": s.what, "step": step, "start": start + factor * s.start, "end": start + factor * s.end}
                    for s in (self.times.spans if trains else attacks)
                ]  # fmt: skip
        return rows


def write_trace(path: Path, trace: NDArray[np.int8]) -> None:
    """Write (steps, workers) of τ as ``.npy``, or as ``.csv`` with a column ``step`` and one per worker.

    Raises:
        ValueError: an unsupported suffix.
    """
    if path.suffix == ".npy":
        np.save(path, trace)
    elif path.suffix == ".csv":
        table = np.column_stack([np.arange(len(trace)), trace])
        names = ",".join(["step", *(f"worker {n}" for n in range(trace.shape[1]))])
        np.savetxt(path, table, fmt="%d", delimiter=",", header=names, comments="")
    else:
        raise ValueError(f"the trace's name is {path.name!r}; allowed: a name that ends in .npy or .csv")


def timeline(times: StepTimes, noise: Stragglers, steps: int, seed: int = 0) -> Timeline:
    """Simulate ``steps`` steps.

    Raises:
        ValueError: fewer than one step, or more slow devices than there are.
    """
    require(steps >= 1, "steps", steps, "a whole number of at least 1")
    require(
        noise.slow_devices <= times.devices, "slow_devices", noise.slow_devices, f"at most {times.devices}"
    )
    return (_with_attackers if times.attackers else _alike)(times, noise, steps, seed)


def _alike(times: StepTimes, noise: Stragglers, steps: int, seed: int) -> Timeline:
    """All devices train: a step takes as long as its slowest device, whatever came before."""
    slowest, busy = [], np.zeros(times.devices)
    shown = np.empty((0, times.devices))
    for block in factors(noise, steps, times.devices, seed):
        slowest.append(block.max(axis=1))
        busy += block.sum(axis=0)
        if len(shown) < SHOWN_STEPS:
            shown = np.concatenate([shown, block[: SHOWN_STEPS - len(shown)]])
    lengths = times.until_reduced(np.concatenate(slowest)) + times.optimizer
    starts = _begun(times, lengths)
    ends = starts + lengths
    tau = np.broadcast_to(np.int8(times.staleness), (steps, times.trainers))
    shown_starts = np.repeat(starts[: len(shown), None], times.devices, axis=1)
    return Timeline(times, starts, ends, busy * times.compute, tau, shown_starts, shown)


def _begun(times: StepTimes, lengths: Times) -> Times:
    """Starts of steps of known lengths, if the loader may be late."""
    if times.input_s <= lengths.min():  # late for the first step only
        return times.input_s + np.concatenate([[0.0], np.cumsum(lengths[:-1])])
    starts, end = np.empty(len(lengths)), 0.0
    loader = _Loader(times)
    for step, length in enumerate(lengths):
        starts[step] = loader.start(end)
        end = starts[step] + length
    return starts


class _Loader:
    """Prepares batches in sequence, at most ``prefetch`` ahead of the step that takes them."""

    def __init__(self, times: StepTimes) -> None:
        self.each, self.made = times.input_s, 0.0
        self.room = deque([0.0] * times.prefetch)

    def start(self, wanted: float) -> float:
        """When the next step can start, if it could otherwise start at ``wanted``."""
        self.made = max(self.made, self.room.popleft()) + self.each
        start = max(wanted, self.made)
        self.room.append(start)
        return start


def _makers(times: StepTimes) -> NDArray[np.int64]:
    """(trainers, width) numbers of the attackers that each trainer waits for; (1, width) if all wait for the same.

    Attacked images belong to a trainer; an ascent is one gradient, averaged over all attackers.
    """
    if times.what == "ascent":
        return np.arange(times.attackers)[None]
    return shared_attackers(times.trainers, times.attackers)


def _with_attackers(times: StepTimes, noise: Stragglers, steps: int, seed: int) -> Timeline:
    """The first devices train, the others attack; see the module docstring."""
    trainers, tau = times.trainers, times.staleness
    makers = _makers(times)
    starts, ends = np.empty(steps), np.empty(steps)
    taus = np.empty((steps, trainers), dtype=np.int8)
    arrived = np.empty(steps)  # when each step's weights reach the attackers
    free = np.zeros(times.attackers)
    busy = np.zeros(times.devices)
    shown: list[tuple[Times, Times]] = []
    loader, end, step = _Loader(times), 0.0, 0
    for block in factors(noise, steps, times.devices, seed):
        reduced = times.until_reduced(block[:, :trainers].copy())
        attack = block[:, trainers:] * times.side
        busy += block.sum(axis=0)
        for row in range(len(block)):
            starts[step] = loader.start(end)
            arrived[step] = end + times.broadcast
            begun = np.maximum(free, arrived[max(0, step - tau)])
            free = begun + attack[row]
            newer = np.zeros(times.attackers, dtype=np.int8)
            for behind in range(min(tau, step)):
                newer += arrived[step - behind] > begun
            taus[step] = newer[makers].max(axis=1)
            own = np.maximum(free[makers].max(axis=1) + times.send, starts[step])
            end = float((own + reduced[row]).max()) + times.optimizer
            ends[step] = end
            if step < SHOWN_STEPS:
                shown.append((np.concatenate([np.broadcast_to(own, trainers), begun]), block[row]))
            step += 1
    seconds = np.concatenate([np.full(trainers, times.compute), np.full(times.attackers, times.side)])
    shown_starts, shown_factors = (np.array(part) for part in zip(*shown, strict=True))
    return Timeline(times, starts, ends, busy * seconds, taus, shown_starts, shown_factors)
