"""The same cluster as processes and events in SimPy: slow, literal, and written apart from the timeline.

Every device, loader, network and attacker is a process of its own that waits for what it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import simpy


@dataclass
class Job:
    """Raw seconds; the fields of `StepTimes` say what they mean together."""

    trainers: int
    steps: int
    passes: list[float]  # one after another on a trainer; the last one's backward makes the gradients
    bucket_bytes: list[float]
    reduce: Callable[[float], float]
    optimizer: float = 0.0
    attackers: int = 0
    side: float = 0.0
    broadcast: float = 0.0
    send: float = 0.0
    staleness: int = 1
    loading: float = 0.0
    prefetch: int = 2
    stretch: float = 1.0
    makers: list[set[int]] = field(default_factory=list)  # of each trainer's images


@dataclass
class Outcome:
    makespan: float
    ends: list[float]
    busy: np.ndarray
    taus: np.ndarray


class Simulation:
    """One run of a job; ``factors`` is (steps, trainers + attackers)."""

    def __init__(self, job: Job, factors: np.ndarray) -> None:
        self.job, self.factors, self.env = job, factors, simpy.Environment()
        steps, env = range(job.steps), self.env
        self.updated = [env.event() for _ in range(job.steps + 1)]  # weights of a step exist
        self.arrived = [env.event() for _ in steps]  # and are at the attackers
        self.made = [[[env.event() for _ in job.bucket_bytes] for _ in range(job.trainers)] for _ in steps]
        self.reduced = [env.event() for _ in steps]
        self.attacked = [[env.event() for _ in range(job.attackers)] for _ in steps]
        self.newest = -1
        self.ends: list[float] = []
        self.busy = np.zeros(job.trainers + job.attackers)
        self.taus = np.full((job.steps, job.trainers), -1 if job.attackers else job.staleness)

    def run(self) -> Outcome:
        for device in range(self.job.trainers):
            self.env.process(self.trainer(device))
        for device in range(self.job.attackers):
            self.env.process(self.attacker(device))
        self.env.process(self.network())
        self.env.process(self.weights())
        self.updated[0].succeed()
        self.env.run(until=self.updated[self.job.steps])
        return Outcome(self.ends[-1], self.ends, self.busy, self.taus)

    def work(self, device, step, seconds):
        seconds *= self.factors[step, device]
        self.busy[device] += seconds
        return self.env.timeout(seconds)

    def loader(self, slots, shelf):
        for step in range(self.job.steps):
            yield slots.get(1)
            yield self.env.timeout(self.job.loading)
            yield shelf.put(step)

    def trainer(self, device):
        job = self.job
        slots = simpy.Container(self.env, init=job.prefetch, capacity=job.prefetch)
        shelf = simpy.Store(self.env)
        if job.loading:
            self.env.process(self.loader(slots, shelf))
        for step in range(job.steps):
            yield self.updated[step]
            if job.loading:
                yield shelf.get()
                yield slots.put(1)
            if job.attackers:
                yield self.env.all_of([self.attacked[step][maker] for maker in job.makers[device]])
            for seconds in job.passes[:-1]:
                yield self.work(device, step, job.stretch * seconds)
            last = job.stretch * job.passes[-1]
            yield self.work(device, step, last / 3)
            for number, size in enumerate(job.bucket_bytes):
                yield self.work(device, step, last * 2 / 3 * size / sum(job.bucket_bytes))
                self.made[step][device][number].succeed()
            yield self.reduced[step]

    def network(self):
        for step in range(self.job.steps):
            for number, size in enumerate(self.job.bucket_bytes):
                yield self.env.all_of([own[number] for own in self.made[step]])
                yield self.env.timeout(self.job.reduce(size))
            self.reduced[step].succeed()

    def weights(self):
        for step in range(self.job.steps):
            self.env.process(self.carry(step))
            yield self.reduced[step]
            yield self.env.timeout(self.job.optimizer)
            self.ends.append(self.env.now)
            self.updated[step + 1].succeed()

    def carry(self, step):
        yield self.updated[step]
        yield self.env.timeout(self.job.broadcast)
        self.newest = step
        self.arrived[step].succeed()

    def attacker(self, number):
        job = self.job
        for step in range(job.steps):
            yield self.arrived[max(0, step - job.staleness)]
            tau = step - self.newest
            for device in range(job.trainers):
                if number in job.makers[device]:
                    self.taus[step, device] = max(self.taus[step, device], tau)
            yield self.work(job.trainers + number, step, job.side)
            self.env.process(self.deliver(step, number))

    def deliver(self, step, number):
        yield self.env.timeout(self.job.send)
        self.attacked[step][number].succeed()


def interrupted(draw, work, stretch, checkpoint, restart, requeue, failure_rate, preemption_rate):
    """Seconds of one run to its end, with a process beside it that fails and preempts it."""
    env = simpy.Environment()
    tasks: list[tuple[str, float]] = []
    left = work
    while left > 0:
        tasks += [("work", min(stretch, left)), ("checkpoint", checkpoint)]
        left -= stretch
    running = [False]

    def job():
        place, rest = 0, tasks[0][1]
        saved = place, rest
        while place < len(tasks):
            begun, running[0] = env.now, True
            try:
                yield env.timeout(rest)
            except simpy.Interrupt as why:
                running[0] = False
                if why.cause == "preempted":
                    rest -= env.now - begun
                    saved = place, rest
                    yield env.timeout(checkpoint + requeue + restart)
                else:
                    place, rest = saved
                    yield env.timeout(restart)
                continue
            kind, place = tasks[place][0], place + 1
            rest = tasks[place][1] if place < len(tasks) else 0.0
            if kind == "checkpoint":
                saved = place, rest

    process = env.process(job())

    def nuisance():
        rate = failure_rate + preemption_rate
        while True:
            yield env.timeout(draw.exponential(1 / rate))
            if running[0] and process.is_alive:
                process.interrupt("preempted" if draw.random() < preemption_rate / rate else "failed")

    env.process(nuisance())
    env.run(until=process)
    return env.now
