"""The timeline against the same cluster in SimPy: to 1e-9 for given factors, in distribution for random ones."""

import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from conadv_lab.staleness.timeline.cluster import Cluster, Compute, Failures, Network, Stragglers
from conadv_lab.staleness.timeline.communication import all_reduce, point_to_point
from conadv_lab.staleness.timeline.interruptions import Interruptions, finish_seconds, interruptions
from conadv_lab.staleness.timeline.recursion import timeline
from conadv_lab.staleness.timeline.step_times import step_times
from conadv_lab.staleness.timeline.stragglers import factors
from conadv_lab.staleness.timeline.workload import Workload
from tests.staleness.timeline.discrete_event import Job, Simulation, interrupted

FIXED, EACH, OPTIMIZER, GRADIENT = 3e-3, 0.2e-3, 0.4e-3, 40e6
NETWORK = Network(devices_per_node=4, node_gbs=20.0, cards_per_node=2, card_gbs=4.0, bucket_mb=8.0)
CLUSTER = Cluster("test", compute={"net": Compute(1e3 * FIXED, 1e3 * EACH, 1e3 * OPTIMIZER)}, network=NETWORK)
WORK = Workload("test", "net", 1000, 1.0, 96, 10_000_000, bytes_each=4, values=100)
LOGNORMAL = Stragglers("lognormal", 0.2, slow_devices=1, slow_factor=1.3)
EXPONENTIAL = Stragglers("exponential", 0.3)
QUIET = Stragglers()


def training(images):
    return FIXED + EACH * images


def attack(images):
    return 0.6 * FIXED + 2 / 3 * EACH * images


def job(
    method, devices, attackers=0, staleness=1, placement="serial", steps=30, loading=0.0, prefetch=2, batch=96
):
    """What a step of the method is, from the words of docs/staleness.md."""
    trainers = devices - attackers
    images = batch / trainers
    train, halves = [training(images)], [training(images)] * 2
    passes = {
        "vanilla": train,
        "disadv": [attack(images), *halves],
        "conadv": halves if placement != "serial" else [attack(images), *halves],
        "recycled": halves,
        "recycled-equal": train,
        "sam": train * 2,
        "asyncsam": train if placement != "serial" else train * 2,
    }[method]
    size = WORK.parameters * WORK.bytes_each
    made = Job(trainers, steps, passes, [1e6] + [8e6] * 4 + [7e6], lambda b: all_reduce(NETWORK, b, trainers),
               OPTIMIZER, attackers, loading=loading, prefetch=prefetch)  # fmt: skip
    made.staleness = 0 if method in ("vanilla", "disadv", "sam") else staleness
    if placement == "stream":
        arithmetic = EACH * images
        made.passes = {
            "vanilla": train,
            "disadv": [FIXED + (2 / 3 + 1) * arithmetic, training(images)],
            "conadv": [FIXED + (2 / 3 + 2) * arithmetic],
            "recycled": [FIXED + 2 * arithmetic],
            "sam": train * 2,
            "asyncsam": [FIXED + 2 * arithmetic],
        }[method]
    if attackers:
        theirs = batch / attackers
        made.side = attack(theirs) if method == "conadv" else training(theirs)
        made.broadcast = point_to_point(NETWORK, size)
        made.send = point_to_point(NETWORK, images * WORK.values / 8)
        if method == "asyncsam":
            made.send = point_to_point(NETWORK, size) + all_reduce(NETWORK, size, attackers)
        made.makers = [makers_of(n, trainers, attackers) for n in range(trainers)]
        if method == "asyncsam":  # one ascent gradient, averaged over all of them
            made.makers = [set(range(attackers))] * trainers
    return made


def makers_of(trainer, trainers, attackers):
    """The attackers that hold some of the images of a trainer, found image by image."""
    fine = 97 * trainers * attackers  # so many images that no border is missed
    own = range(fine * trainer // trainers, fine * (trainer + 1) // trainers)
    return {image * attackers // fine for image in own}


def both(method, devices, noise, seed=0, **options):
    attackers, placement = options.get("attackers", 0), options.get("placement", "serial")
    loading, prefetch = options.get("loading", 0.0), options.get("prefetch", 2)
    work = WORK.replace(global_batch=options.get("batch", 96))
    theirs = job(method, devices, **options)
    changed = {"prefetch": prefetch}
    if loading:
        changed["images_per_second"] = work.global_batch / (devices - attackers) / loading
    own = step_times(
        CLUSTER.replace(input=changed), work, method, devices, placement=placement,
        attackers=attackers or None, staleness=options.get("staleness", 1),
    )  # fmt: skip
    drawn = np.concatenate(list(factors(noise, theirs.steps, devices, seed)))
    return timeline(own, noise, theirs.steps, seed), Simulation(theirs, drawn).run()


SERIAL = [
    (m, {"devices": 6})
    for m in ("vanilla", "disadv", "conadv", "recycled", "recycled-equal", "sam", "asyncsam")
]
PLACED = [
    ("conadv", {"devices": 6, "placement": "stream"}),
    *(
        (m, {"devices": 6, "placement": "stream"})
        for m in ("vanilla", "disadv", "recycled", "sam", "asyncsam")
    ),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 1, "staleness": 3}),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 3, "staleness": 1}),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 3, "staleness": 0}),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 4, "staleness": 2}),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 7, "staleness": 4}),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 2, "staleness": 3, "batch": 960}),  # too few
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 1, "staleness": 1, "batch": 960}),
    ("asyncsam", {"devices": 8, "placement": "ranks", "attackers": 3, "staleness": 1}),
    ("disadv", {"devices": 1}),
]
LOADED = [
    ("vanilla", {"devices": 6, "loading": 0.030, "prefetch": 1}),
    ("vanilla", {"devices": 6, "loading": 0.0105, "prefetch": 3}),
    ("vanilla", {"devices": 6, "loading": 0.001}),
    ("conadv", {"devices": 9, "placement": "ranks", "attackers": 3, "loading": 0.02}),
]


@pytest.mark.parametrize("noise", [QUIET, LOGNORMAL, EXPONENTIAL], ids=lambda noise: noise.kind)
@pytest.mark.parametrize(("method", "options"), SERIAL + PLACED + LOADED)
def test_every_step_ends_when_the_events_say(method, options, noise):
    ours, theirs = both(method, noise=noise, **options)
    np.testing.assert_allclose(ours.ends, theirs.ends, rtol=1e-9, atol=0)
    np.testing.assert_allclose(ours.busy, theirs.busy, rtol=1e-9)
    np.testing.assert_array_equal(ours.trace, theirs.taus)
    assert ours.makespan == pytest.approx(theirs.makespan, rel=1e-9)


def test_late_attackers_make_the_effective_staleness_smaller():
    few, _ = both("conadv", 9, LOGNORMAL, placement="ranks", attackers=1, staleness=4, batch=960)
    many, _ = both("conadv", 9, LOGNORMAL, placement="ranks", attackers=5, staleness=4)
    assert set(np.unique(many.trace[10:])) == {4}  # attackers in time: exactly τ
    assert few.trace[10:].mean() < 2
    shares = few.tau_of_workers()
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_allclose(shares @ np.arange(5), few.trace.mean(axis=0))


@pytest.mark.parametrize("noise", [LOGNORMAL, EXPONENTIAL], ids=lambda noise: noise.kind)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("disadv", {"devices": 6}),
        ("conadv", {"devices": 8, "placement": "ranks", "attackers": 2, "staleness": 2}),
    ],
)
def test_makespans_have_the_same_distribution(method, options, noise):
    ours, theirs = [], []
    draw = np.random.default_rng(7)
    own = step_times(
        CLUSTER, WORK, method, options["devices"],
        **{k: v for k, v in options.items() if k != "devices"},
    )  # fmt: skip
    events = job(method, steps=12, **options)
    for run in range(150):
        ours.append(timeline(own, noise, 12, seed=run).makespan)
        shape = (12, options["devices"])
        if noise.kind == "lognormal":
            drawn = draw.lognormal(-(noise.spread**2) / 2, noise.spread, shape)
        else:
            drawn = 1 + draw.exponential(noise.spread, shape)
        drawn[:, : noise.slow_devices] *= noise.slow_factor
        theirs.append(Simulation(events, drawn).run().makespan)
    assert ks_2samp(ours, theirs).pvalue > 0.01
    assert ks_2samp(ours, [1.02 * one for one in theirs]).pvalue < 0.01  # a difference of 2 % would be seen


def expected_seconds(work: float, job: Interruptions) -> float:
    """Daly's expectation for ``work`` seconds of steps, with failures and without preemptions."""
    whole, rest = divmod(work, job.stretch)
    lengths, mean = [job.stretch] * int(whole) + [rest] * bool(rest), 1 / job.failure_rate
    return sum(math.expm1((length + job.checkpoint) / mean) for length in lengths) * (mean + job.restart)


@pytest.mark.parametrize("preemptions", [None, 0.3])
def test_runs_with_interruptions_have_the_same_distribution(preemptions):
    failures = Failures(
        device_hours=2.0, preemption_hours=preemptions, checkpoint_s=20.0, restart_s=60.0, requeue_s=90.0,
        checkpoint_every=200,
    )  # fmt: skip
    found = interruptions(failures, devices=8, step_seconds=1.5)
    ours = finish_seconds(5000.0, found, runs=4000, seed=0)
    draw = np.random.default_rng(3)
    theirs = [
        interrupted(draw, 5000.0, 300.0, 20.0, 60.0, 90.0, 8 / 7200, 0.0 if preemptions is None else 1 / 1080)
        for _ in range(800)
    ]
    assert ks_2samp(ours, theirs).pvalue > 0.01
    assert ks_2samp(ours, [1.04 * one for one in theirs]).pvalue < 0.01
    if preemptions is None:
        assert ours.mean() == pytest.approx(expected_seconds(5000.0, found), rel=0.02)
