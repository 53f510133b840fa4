"""The passes of one device in one step, one after another, in seconds without noise.

A training pass over b images takes a + c·b (`cluster.Compute`); an attack pass has no weight gradients, so that its
shares of a and c are smaller (`cluster.Attack`). More images than a micro-batch pay a for each micro-batch.
"""

from dataclasses import dataclass
from math import ceil

from conadv_lab.methods.base import Method
from conadv_lab.staleness.timeline.cluster import Cluster
from conadv_lab.staleness.timeline.workload import Workload


@dataclass(frozen=True)
class Span:
    """A pass of a device within a step, in seconds from the step's start: ``what`` on ``lane``."""

    lane: str
    what: str
    start: float
    end: float


class Passes:
    """What a device with ``images`` of its own computes in a step.

    Attributes:
        end: seconds of all passes.
        last: seconds of the last micro-batch of the last pass, whose backward makes the gradients.
        spans: the passes.
    """

    def __init__(self, cluster: Cluster, workload: Workload, images: float) -> None:
        one = cluster.of(workload.model)
        self.a, self.c = one.fixed_ms / 1e3, one.image_ms / 1e3
        self.attack, self.workload, self.images = cluster.attack, workload, images
        self.spans: list[Span] = []
        self.end = self.last = self.fixed = 0.0

    def add_step(self, method: Method, placement: str) -> None:
        """All passes of a trainer."""
        beside = bool(method.side) and placement == "stream" and method.staleness > 0
        if method.side and placement != "ranks" and not beside:
            self._add(method.side, *self._side(method))
        clean, altered = method.clean_fraction * self.images, method.altered_fraction * self.images
        if method.together:  # a micro-batch of clean images brings its altered ones along
            self._add("train", *self._train(clean + altered, parts=self._train(clean)[2]))
        elif self.workload.joint or not (clean and altered):
            self._add("train", *self._train(clean + altered))
        else:
            self._add("clean", *self._train(clean))
            self._add("altered", *self._train(altered))
        if beside:
            self._stretch(method.side, *self._side(method)[:2])

    def side(self, method: Method) -> float:
        """Seconds of an attack or ascent over the device's images."""
        return sum(self._side(method)[:2])

    def _stretch(self, what: str, fixed: float, work: float) -> None:
        """Two streams of one device: work adds up, of the two fixed costs the smaller one hides."""
        hidden = self.attack.overlap * min(fixed, self.fixed)
        longer = (self.end + fixed + work - hidden) / self.end
        self.spans = [Span(s.lane, s.what, s.start * longer, s.end * longer) for s in self.spans]
        self.end, self.last = self.end * longer, self.last * longer
        self.spans.append(Span("stream", what, 0.0, self.end))

    def _add(self, what: str, fixed: float, work: float, parts: float) -> None:
        self.spans.append(Span("compute", what, self.end, self.end + fixed + work))
        self.end += fixed + work
        self.fixed += fixed
        self.last = (fixed + work) / parts

    def _train(self, images: float, parts: int | None = None) -> tuple[float, float, int]:
        """(fixed seconds, seconds of the images, micro-batches)."""
        limit = self.workload.micro_batch
        if parts is None:
            parts = 1 if limit is None else max(1, ceil(images / limit))
        return self.a * parts, self.c * images, parts

    def _side(self, method: Method) -> tuple[float, float, float]:
        """(fixed seconds, seconds of the images, passes)"""
        fixed, work, parts = self._train(self.images * method.side_share)
        if method.side == "attack":
            fixed, work = self.attack.fixed_share * fixed, self.attack.image_share * work
        return method.side_steps * fixed, method.side_steps * work, method.side_steps * parts
