"""Times of each device in one step of a method, in seconds without noise.

Gradients are averaged in buckets during a device's last backward passes, which `passes` determines.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from conadv_lab.config import Config, resolved
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.base import Method
from conadv_lab.mistakes import require, unknown
from conadv_lab.references import is_file_reference
from conadv_lab.staleness.timeline.cluster import Cluster
from conadv_lab.staleness.timeline.communication import all_reduce, point_to_point
from conadv_lab.staleness.timeline.passes import Passes, Span
from conadv_lab.staleness.timeline.workload import Workload

PLACEMENTS = ("serial", "stream", "ranks")
CAPTURES = ("auto", "on", "off")
MOST_CAPTURED = 8
"""Largest number of micro-batches per device for which ``auto`` captures, as in training."""
BACKWARD = 2 / 3
"""Fraction of a training pass: forward, input gradient and weight gradient count equally (docs/semantics.md)."""
FIRST_BUCKET = 1e6
"""Bytes; PyTorch's DistributedDataParallel uses a first bucket of 1 MB so that communication starts early."""


@dataclass(frozen=True)
class StepTimes:
    """One step of one method on one cluster.

    Attributes:
        devices: total number; the first ``trainers`` of them train, the others attack.
        images: clean images per trainer and step.
        compute: seconds of a trainer's passes.
        ready: (buckets,) seconds from the start of the passes until each bucket's gradients are computed.
        reduce: (buckets,) seconds of each bucket's all-reduce; they run in sequence.
        optimizer: seconds after the last all-reduce.
        what: an attacker's pass, attack or ascent; side: seconds of it (placement ranks), else 0.
        broadcast: seconds until new weights reach the attackers; send: until a result reaches its trainers.
        staleness: τ; with ranks the largest possible value.
        input_s: seconds in which a loader prepares one step's images; 0: never a bottleneck.
        prefetch: how many batches it may be ahead.
        spans: the passes of a trainer.
        captured: whether they are replayed from a CUDA graph, without launches by the host.
    """

    method: str
    placement: str
    devices: int
    trainers: int
    images: float
    compute: float
    ready: NDArray[np.float64]
    reduce: NDArray[np.float64]
    optimizer: float
    staleness: int
    what: str = ""
    side: float = 0.0
    broadcast: float = 0.0
    send: float = 0.0
    input_s: float = 0.0
    prefetch: int = 2
    spans: tuple[Span, ...] = ()
    captured: bool = True

    @property
    def attackers(self) -> int:
        return self.devices - self.trainers

    def until_reduced(self, factor: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds from a device's start to the end of the last all-reduce, if no other device is slower.

        Bucket i is on the network at max(ready, end of bucket i − 1), so the last one ends at
        max over i of (factor · ready_i + Σ_{j ≥ i} reduce_j).
        """
        left = np.cumsum(self.reduce[::-1])[::-1]
        longest = factor * self.ready[0] + left[0]
        for ready, rest in zip(self.ready[1:], left[1:], strict=True):
            np.maximum(longest, factor * ready + rest, out=longest)
        return longest


def step_times(
    cluster: Cluster,
    workload: Workload,
    method: "str | Method",
    devices: int,
    *,
    placement: str = "serial",
    attackers: int | None = None,
    staleness: int | None = None,
    ascent_share: float = 1.0,
    capture: str = "auto",
) -> StepTimes:
    """The step of ``method``.

    Args:
        method: a name, ``path/to/file.py:function``, or a method.
        placement: ``serial``: passes in sequence; ``stream``: independent passes in parallel on a device; ``ranks``: a
            stale attack or ascent on other devices.
        attackers: number of attackers, with ranks; None: a quarter of the devices, at least one.
        staleness: τ; None: the workload's, or the method's own.
        ascent_share: fraction of a batch that asyncsam's ascent uses.
        capture: whether a step is replayed from a CUDA graph, which takes the host no time: ``on``, ``off``, or
            ``auto`` as in training: with few micro-batches per device, and no attackers. A captured step sends its
            gradients after its passes. If a cluster does not give the time of a launch, all steps are assumed to be
            captured, with their messages overlapping the backward pass.

    Raises:
        ValueError: an unknown name, or inconsistent numbers.
    """
    require(devices >= 1, "devices", devices, "a whole number of at least 1")
    own_method = method if isinstance(method, Method) else named(method, workload, staleness, ascent_share)
    _check(own_method, placement)
    count = _attackers(placement, devices, attackers)
    trainers = devices - count
    at_most = f"at most {workload.global_batch}, the images of a step"
    require(trainers <= workload.global_batch, "devices that train", trainers, at_most)
    require(count <= workload.global_batch, "attackers", count, at_most)
    images = workload.global_batch / trainers
    step = Passes(cluster, workload, images)
    launched = cluster.host.launch_us is not None and step.compute.launches > 0
    captured = _captured(capture, cluster, step, launched, placement)
    step.add_step(
        own_method,
        beside="all" if placement == "stream" else "none",
        replayed="all" if captured else "none",
        elsewhere=placement == "ranks",
    )
    sizes = buckets(workload.parameters * workload.bytes_each, cluster.network.bucket_mb)
    left = 1 - np.cumsum(sizes) / sizes.sum()
    rate = cluster.input.images_per_second
    own = StepTimes(
        own_method.name, placement, devices, trainers, images, step.end,
        ready=step.end - (0.0 if captured and launched else BACKWARD) * step.last * left,
        reduce=np.array([all_reduce(cluster.network, one, trainers) for one in sizes]),
        optimizer=cluster.of(workload.model, workload.precision).optimizer_ms / 1e3,
        staleness=own_method.staleness,
        input_s=0.0 if rate is None else images / rate,
        prefetch=cluster.input.prefetch,
        spans=tuple(step.spans),
        captured=captured,
    )  # fmt: skip
    return own if count == 0 else _with_attackers(own, own_method, cluster, workload)


def _with_attackers(own: StepTimes, method: Method, cluster: Cluster, workload: Workload) -> StepTimes:
    """The step with the attackers' work and network traffic added."""
    weights = float(workload.parameters * workload.bytes_each)
    network, count = cluster.network, own.attackers
    if method.side == "ascent":
        send = all_reduce(network, weights, count) + point_to_point(network, weights)
    else:
        send = point_to_point(network, own.images * workload.values * method.kept_bytes(1))
    side = Passes(cluster, workload, workload.global_batch / count).side(method)
    return replace(own, what=method.side, side=side, broadcast=point_to_point(network, weights), send=send)


def named(name: str, workload: Workload, staleness: int | None = None, ascent_share: float = 1.0) -> Method:
    """The named method with this staleness, or the recipe's if None.

    Raises:
        ValueError: an unknown name or an invalid number.
    """
    if staleness is not None:
        require(0 <= staleness <= 127, "staleness", staleness, "a whole number from 0 to 127")
    require(0 < ascent_share <= 1, "ascent_share", ascent_share, "above 0, up to 1")
    own = METHODS[name].filled(Config().replace(method=name)) if name in METHODS else {}
    tau = own.get("staleness", workload.staleness) if staleness is None else staleness
    if name not in METHODS and not is_file_reference(name):
        raise unknown("method", name, METHODS)
    method = method_of(resolved(_with(workload.config, name, tau)))
    if name == "asyncsam":
        method.side_share = ascent_share
    return method


def _with(config: Config, name: str, staleness: int | None) -> Config:
    """A config with another method and the recipe's method options; placement and optimizer are reset."""
    options = Config(method=config.method)
    return options.replace(method=name, staleness=staleness, placement="serial", attackers=0)


def _captured(capture: str, cluster: Cluster, step: Passes, launched: bool, placement: str) -> bool:
    if capture not in CAPTURES:
        raise unknown("capture", capture, CAPTURES)
    if capture == "off" and not launched:
        raise ValueError(
            f"capture is 'off', but cluster {cluster.name} has no launch times; allowed: 'on', or "
            "--set host.launch_us=… with the model's number of launches"
        )
    if capture != "auto" or not launched:
        return capture != "off"
    return placement != "ranks" and step.micro_batches <= MOST_CAPTURED


def _check(method: Method, placement: str) -> None:
    if placement not in PLACEMENTS:
        raise unknown("placement", placement, PLACEMENTS)
    if placement == "ranks" and not method.concurrent:
        raise ValueError(f"placement is {placement!r}; allowed for {method.name}: serial, stream")


def buckets(size: float, bucket_mb: float) -> NDArray[np.float64]:
    """Bytes of each bucket, in the order in which the backward pass fills them.

    >>> buckets(51e6, 25).tolist()
    [1000000.0, 25000000.0, 25000000.0]
    >>> buckets(51e6, 64).tolist()
    [51000000.0]
    """
    full = min(bucket_mb * 1e6, size)
    if full >= size:
        return np.array([float(size)])
    sizes = [min(FIRST_BUCKET, full)]
    while sum(sizes) < size:
        sizes.append(min(full, size - sum(sizes)))
    return np.array(sizes)


def _attackers(placement: str, devices: int, attackers: int | None) -> int:
    if placement != "ranks":
        if attackers:
            raise ValueError(f"attackers is {attackers}; allowed with placement {placement}: None")
        return 0
    count = max(1, devices // 4) if attackers is None else attackers
    allowed = (
        f"1 to {devices - 1}, fewer than the {devices} devices"
        if devices > 1
        else "none, as one device has to train"
    )
    require(1 <= count < devices, "attackers", count, allowed)
    return count


def shared_attackers(trainers: int, attackers: int) -> NDArray[np.int64]:
    """(trainers, width) numbers of the attackers of each trainer's images; a row may repeat one.

    Trainers and attackers each split a step's images, in order, into equal pieces.

    >>> shared_attackers(3, 2).tolist()
    [[0, 0], [0, 1], [1, 1]]
    """
    first = np.arange(trainers) * attackers // trainers
    last = (np.arange(1, trainers + 1) * attackers - 1) // trainers
    width = int((last - first).max()) + 1
    return np.minimum(first[:, None] + np.arange(width), last[:, None])
