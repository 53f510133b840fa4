"""The passes of one device in one step, one after another, in seconds without noise.

A training pass over b images takes a + c·b (`cluster.Compute`); an attack pass has no weight gradients, so that its
shares of a and c are smaller (`cluster.Attack`). More images than a micro-batch pay a for each micro-batch.
"""

from dataclasses import dataclass
from math import ceil

from conadv_lab.staleness.cluster import Cluster
from conadv_lab.staleness.workload import Workload

CONCURRENT = {"conadv": "attack", "asyncsam": "ascent"}
"""Methods whose attack (ascent) may be placed beside the step or on other devices."""


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

    def add_step(self, method: str, placement: str, tau: int, share: float) -> None:
        """All passes of a trainer; ``share`` is that of a batch that asyncsam's ascent looks at."""
        beside = method in CONCURRENT and placement == "stream" and tau > 0
        first = method in ("disadv", "sam") or (method in CONCURRENT and placement != "ranks" and not beside)
        if first:
            self._add("attack" if method in ("disadv", "conadv") else "ascent", *self._side(method, share))
        if method in ("vanilla", "sam", "asyncsam") or method.endswith("-equal"):
            self._add("train", *self._train(self.images))
        elif self.workload.joint:
            self._add("train", *self._train(2 * self.images))
        else:
            self._add("clean", *self._train(self.images))
            self._add("altered", *self._train(self.images))
        if beside:
            self._stretch(CONCURRENT[method], *self._side(method, share)[:2])

    def side(self, method: str, share: float) -> float:
        """Seconds of an attack or ascent over the device's images."""
        return sum(self._side(method, share)[:2])

    def _stretch(self, what: str, fixed: float, work: float) -> None:
        """Two streams of one device: work adds up, of the two fixed costs the smaller one hides."""
        hidden = self.attack.overlap * min(fixed, self.fixed)
        longer = (self.end + fixed + work - hidden) / self.end
        self.spans = [Span(s.lane, s.what, s.start * longer, s.end * longer) for s in self.spans]
        self.end, self.last = self.end * longer, self.last * longer
        self.spans.append(Span("stream", what, 0.0, self.end))

    def _add(self, what: str, fixed: float, work: float, parts: int) -> None:
        self.spans.append(Span("compute", what, self.end, self.end + fixed + work))
        self.end += fixed + work
        self.fixed += fixed
        self.last = (fixed + work) / parts

    def _train(self, images: float) -> tuple[float, float, int]:
        """(fixed seconds, seconds of the images, micro-batches)."""
        limit = self.workload.micro_batch
        parts = 1 if limit is None else max(1, ceil(images / limit))
        return self.a * parts, self.c * images, parts

    def _side(self, method: str, share: float) -> tuple[float, float, int]:
        if method in ("sam", "asyncsam"):
            return self._train(self.images * (share if method == "asyncsam" else 1))
        fixed, work, parts = self._train(self.images)
        return self.attack.fixed_share * fixed, self.attack.image_share * work, parts
