"""The passes of one device in one step: which run in sequence, which in parallel, and how long they take.

A training pass over b images takes a + c·b (`cluster.Compute`): a is latency, from kernels too small to fill the
device, c·b is arithmetic. Each micro-batch pays a. For parallel passes the arithmetic adds up, but only the longest
latency remains.

The host has to launch each operator, unless the step is replayed from a CUDA graph. Each layer is launch-bound or
device-bound, so a step with host time H and device time D takes (Hᵖ + Dᵖ)^(1/p): nearly the larger one.
"""

from dataclasses import dataclass
from math import ceil

from conadv_lab.methods.base import Method
from conadv_lab.staleness.timeline.cluster import Cluster
from conadv_lab.staleness.timeline.workload import Workload

LAUNCH_POWER = 3.0
"""p: of 2, 2.5, 3, 3.5 and 4 the best fit to a plain eager loop on an H200, within 2.2 % from 4 to 256 images."""


@dataclass(frozen=True)
class Span:
    """A pass of a device within a step, in seconds from the step's start: ``what`` on ``lane``, of ``lanes`` in use."""

    lane: int
    lanes: int
    what: str
    start: float
    end: float


@dataclass(frozen=True)
class Pass:
    """A pass over all images of a device: seconds of latency, arithmetic and launching, and its micro-batches."""

    what: str
    fixed: float
    work: float
    launching: float
    parts: float

    @property
    def seconds(self) -> float:
        """Alone on a device, replayed."""
        return self.fixed + self.work


Stage = list[list[Pass]]
"""Lanes that run in parallel until all are done; the passes of a lane run in sequence."""


class Passes:
    """What a device with ``images`` images computes in a step.

    Attributes:
        end: seconds of all passes.
        last: seconds of the last micro-batch of the last stage, whose backward pass completes the gradients.
        spans: the passes.
    """

    def __init__(self, cluster: Cluster, workload: Workload, images: float) -> None:
        one = cluster.of(workload.model, workload.precision)
        self.compute, self.attack, self.host = one, cluster.attack, cluster.host
        self.workload, self.images = workload, images
        self.spans: list[Span] = []
        self.end = self.last = 0.0

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of clean images."""
        return self._parts(self.images)

    def add_step(
        self, method: Method, beside: str = "none", replayed: str = "none", elsewhere: bool = False
    ) -> None:
        """All passes of a trainer.

        Args:
            beside: which passes run in parallel: ``none``, ``all`` independent ones, or only the ``attack`` with the
                others.
            replayed: what needs no launches: ``none``, only the ``attack``, or ``all``.
            elsewhere: attack or ascent run on other devices.
        """
        stages = self.stages(method, beside, elsewhere)
        ends: list[float] = []
        for stage in stages:
            ends.append((ends[-1] if ends else 0.0) + self._length(stage))
        launched = 0.0
        for one in (one for stage in stages for lane in stage for one in lane):
            if replayed == "none" or (replayed == "attack" and one.what != "attack"):
                launched += one.launching
        self.end = _launched(ends[-1], launched)
        stretch = self.end / ends[-1]
        for stage, start, end in zip(stages, [0.0, *ends], ends, strict=False):
            for number, lane in enumerate(stage):
                self._show(number, len(stage), lane, start * stretch, end * stretch)
        length = ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)
        self.last = length * stretch / max(one.parts for lane in stages[-1] for one in lane)

    def stages(self, method: Method, beside: str, elsewhere: bool = False) -> list[Stage]:
        """The step as a sequence of stages.

        The step does not wait for a stale side computation. The clean pass never waits for an attack, which leaves the
        weights unchanged; everything waits for an ascent, which moves them.
        """
        train = self._training(method)
        again = method.repeats
        side = [self.side_pass(method)] if method.side and not elsewhere else []
        if beside == "none":
            return [[[one]] for one in (*side, *(1 + again) * train)]
        apart: Stage = [[one] for one in train]
        if not side:
            return (1 + again) * [apart]
        if (method.concurrent or again) and method.staleness:
            return [[side, train] if beside == "attack" else [side, *apart], *again * [apart]]
        if method.side == "attack" and len(train) > 1:
            return [[side, [train[0]]], [[train[1]]], *again * [apart]]
        return [[side], *(1 + again) * [apart]]

    def side_pass(self, method: Method) -> Pass:
        """The attack or ascent over the device's images."""
        one = self._pass(method.side, self.images * method.side_share)
        fixed, image = 1.0, 1.0
        launching = one.launching
        if method.side == "attack":
            fixed, image = self.attack.fixed_share, self.attack.image_share
            launching = self._launching(self.compute.attack_launches, one.parts)
        steps = method.side_steps
        return Pass(
            one.what,
            steps * fixed * one.fixed,
            steps * image * one.work,
            steps * launching,
            steps * one.parts,
        )

    def side(self, method: Method) -> float:
        """Seconds of an attack or ascent alone on a device, not replayed."""
        one = self.side_pass(method)
        return _launched(one.seconds, one.launching)

    def _training(self, method: Method) -> list[Pass]:
        clean, altered = method.clean_fraction * self.images, method.altered_fraction * self.images
        if method.together:  # a micro-batch of clean images includes its altered ones
            parts = self._parts(clean)
            launches = self.compute.together_launches or self.compute.launches
            return [self._pass("train", clean + altered, parts, launches)]
        if self.workload.joint or not (clean and altered):
            return [self._pass("train", clean + altered)]
        return [self._pass("clean", clean), self._pass("altered", altered)]

    def _pass(self, what: str, images: float, parts: int | None = None, launches: int | None = None) -> Pass:
        parts = self._parts(images) if parts is None else parts
        launching = self._launching(self.compute.launches if launches is None else launches, parts)
        return Pass(
            what, self.compute.fixed_ms / 1e3 * parts, self.compute.image_ms / 1e3 * images, launching, parts
        )

    def _launching(self, launches: int, parts: float) -> float:
        return parts * launches * (self.host.launch_us or 0.0) / 1e6

    def _parts(self, images: float) -> int:
        limit = self.workload.micro_batch
        return 1 if limit is None else max(1, ceil(images / limit))

    def _length(self, stage: Stage) -> float:
        latencies = [sum(one.fixed for one in lane) for lane in stage]
        hidden = self.attack.overlap * (sum(latencies) - max(latencies))
        return sum(one.seconds for lane in stage for one in lane) - hidden

    def _show(self, number: int, lanes: int, lane: list[Pass], start: float, end: float) -> None:
        """Record the lane's passes, stretched over the stage."""
        longer = (end - start) / sum(one.seconds for one in lane)
        for one in lane:
            until = start + longer * one.seconds
            self.spans.append(Span(number, lanes, one.what, start, until))
            start = until


def _launched(device: float, host: float) -> float:
    """Seconds of a step with these device and host times."""
    if not host:
        return device
    return float((device**LAUNCH_POWER + host**LAUNCH_POWER) ** (1 / LAUNCH_POWER))
