"""Limits with closed forms, the communication model, and mistakes."""

import math

import numpy as np
import pytest

from conadv_lab.models.digits import DigitsCNN
from conadv_lab.models.resnet import resnet18, resnet20, resnet50
from conadv_lab.recipes import RECIPES
from conadv_lab.staleness.timeline import calibrate
from conadv_lab.staleness.timeline.cluster import (
    Cluster,
    Compute,
    Network,
    Stragglers,
    load,
    names,
    parse,
    to_toml,
)
from conadv_lab.staleness.timeline.communication import NCCL, all_reduce, bus, one, point_to_point
from conadv_lab.staleness.timeline.interruptions import finish_seconds, interruptions
from conadv_lab.staleness.timeline.recursion import timeline
from conadv_lab.staleness.timeline.simulation import best, one_timeline, simulate
from conadv_lab.staleness.timeline.step_times import METHODS, step_times
from conadv_lab.staleness.timeline.stragglers import factors, mean_slowest
from conadv_lab.staleness.timeline.workload import MODELS, TRAINING_IMAGES, WORKLOADS, Workload, workload_of

FREE = Network(node_gbs=math.inf, card_gbs=math.inf, model="alpha-beta", node_hop_us=0.0, network_hop_us=0.0)
STILL = Cluster("still", compute={"resnet50": Compute(3.48, 0.1434)}, network=FREE)
"""The straight line of H100's seven rows, without communication and noise."""


def work(images: float, devices: int, **fields: object) -> Workload:
    base = Workload("test", "resnet50", 1_281_167, 90.0, round(images * devices), MODELS["resnet50"])
    return base.replace(**fields)


def step_ms(method, images, devices=1, cluster=STILL, joint=False, **options):
    own = step_times(cluster, work(images, devices, joint=joint), method, **({"devices": devices} | options))
    return 1e3 * timeline(own, cluster.stragglers, 50).settled


@pytest.mark.parametrize("devices", [1, 4096])
def test_without_communication_and_noise_a_step_is_its_passes(devices):
    a, c, b = 3.48, 0.1434, 16
    train, attack = a + c * b, 0.6 * a + 2 / 3 * c * b
    expected = {
        "vanilla": train, "disadv": attack + 2 * train, "conadv": attack + 2 * train, "recycled": 2 * train,
        "noise": 2 * train, "copy": 2 * train, "recycled-equal": train, "noise-equal": train, "copy-equal": train,
        "sam": 2 * train, "asam": 2 * train, "asyncsam": 2 * train, "sampa": 2 * train, "looksam": 1.2 * train,
        "conadv-sam": attack + 4 * train, "recycled-msam": 2 * train,
        "late-sam": 1.1 * train, "msam": train, "s2sam": train, "extrap": train,
        "advprop": 5 * attack + 2 * train, "fgsm-rs": attack + train,
        "fast-advprop": train + 2 * (a + c * b / 4), "free-at": train,
    }  # fmt: skip
    assert set(expected) == set(METHODS)
    for method, wanted in expected.items():
        assert step_ms(method, b, devices) == pytest.approx(wanted, rel=1e-9)
    beside = {  # of passes that wait for nothing the arithmetic adds up, and one latency remains
        "vanilla": train, "disadv": a + 5 / 3 * c * b + train, "conadv": a + 8 / 3 * c * b, "recycled": a + 2 * c * b,
        "recycled-equal": train, "sam": 2 * train, "asyncsam": a + 2 * c * b, "fgsm-rs": attack + train,
        "advprop": max(a, 5 * 0.6 * a) + (5 * 2 / 3 + 1) * c * b + train,
        "fast-advprop": a + c * b / 4 + a + 5 / 4 * c * b,
    }  # fmt: skip
    for method, wanted in beside.items():
        assert step_ms(method, b, devices, placement="stream") == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("images", "same", "spare"), [(4, 1.42, 1.53), (16, 1.22, 1.45), (64, 1.07, 1.38), (400, 1.01, 1.34)]
)
def test_reproduces_the_predicted_speed_ups_from_their_own_assumptions(images, same, spare):
    """docs/staleness.md: both halves in one pass, no communication, the straight line's constants."""
    disadv = step_ms("disadv", images, 64, joint=True)
    stream = step_ms("conadv", images, 64, joint=True, placement="stream")
    assert disadv / stream == pytest.approx(same, abs=0.006)
    doubled = step_times(STILL, work(images, 64, joint=True), "conadv", 128, placement="ranks", attackers=64)
    assert disadv / (1e3 * timeline(doubled, Stragglers(), 50).settled) == pytest.approx(spare, abs=0.006)


@pytest.mark.parametrize("placement", ["serial", "stream"])
@pytest.mark.parametrize("devices", [1, 7, 4096])
def test_without_staleness_conadv_is_disadv_exactly(placement, devices):
    noisy = load("h100").replace(stragglers={"spread": 0.1})
    recipe = WORKLOADS["imagenet-resnet50-32k"]
    options = {"devices": devices, "steps": 20, "placement": placement}
    first = one_timeline(noisy, recipe, "disadv", **options)
    second = one_timeline(noisy, recipe, "conadv", staleness=0, **options)
    np.testing.assert_array_equal(first.ends, second.ends)
    np.testing.assert_array_equal(first.trace, second.trace)


def test_one_device_waits_for_nobody():
    done = one_timeline(load("h100"), WORKLOADS["imagenet-resnet50-1k"], "vanilla", devices=1, steps=30)
    assert done.times.reduce.tolist() == [0.0] * len(done.times.reduce)
    assert done.utilisation == pytest.approx(1.0)


def test_4096_devices_wait_for_the_slowest():
    """Shifted exponential factors: the mean of the largest of n is 1 + spread · H_n."""
    cluster = STILL.replace(stragglers={"kind": "exponential", "spread": 0.1})
    done = timeline(step_times(cluster, work(8, 4096), "vanilla", 4096), cluster.stragglers, 2000)
    harmonic = sum(1 / n for n in range(1, 4097))
    assert done.settled * 1e3 == pytest.approx((3.48 + 8 * 0.1434) * (1 + 0.1 * harmonic), rel=0.005)


@pytest.mark.parametrize("noise", [Stragglers("lognormal", 0.3), Stragglers("exponential", 0.3)], ids=str)
@pytest.mark.parametrize("devices", [1, 5, 300])
def test_mean_of_the_slowest(noise, devices):
    drawn = np.concatenate(list(factors(noise, 200_000 // devices, devices, seed=1))).max(axis=1)
    assert mean_slowest(noise, devices) == pytest.approx(
        drawn.mean(), abs=4 * drawn.std() / len(drawn) ** 0.5
    )


def test_a_slow_device_sets_the_pace():
    slow = STILL.replace(stragglers={"slow_devices": 1, "slow_factor": 1.5})
    assert step_ms("vanilla", 16, 8, slow) == pytest.approx(1.5 * step_ms("vanilla", 16, 8))


def test_a_late_loader_sets_the_pace():
    late = STILL.replace(input={"images_per_second": 1000.0})
    assert step_ms("vanilla", 16, 8, late) == pytest.approx(16.0)


def test_factors_are_the_same_for_the_same_seed_and_have_mean_1():
    noise = Stragglers("lognormal", 0.2)
    first, again, other = (np.concatenate(list(factors(noise, 3000, 100, seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.mean() == pytest.approx(1, abs=0.002)
    short = np.concatenate(list(factors(noise, 100, 100, 0)))
    np.testing.assert_array_equal(short, first[:100])  # more steps do not change the first ones


def test_all_reduces_over_alpha_and_beta():
    network = Network(devices_per_node=4, node_gbs=100.0, cards_per_node=2, card_gbs=10.0, model="alpha-beta",
                      node_hop_us=1.0, network_hop_us=5.0)  # fmt: skip
    size, p, nodes = 8e6, 16, 4
    alphas = {"ring": (30 - 6) * 1e-6 + 6 * 5e-6, "tree": 2 * (3 * 1e-6 + 2 * 5e-6)}
    shares = {"ring": 2 * 15 / 16, "tree": 2.0}
    for name, alpha in alphas.items():
        network_of_one = Network(**(network.__dict__ | {"algorithm": name}))
        assert all_reduce(network_of_one, size, p) == pytest.approx(alpha + shares[name] * size / 20e9)
    within = 6e-6 + 2 * 3 / 4 * size / 100e9
    across = 2 * (nodes - 1) / nodes * (size / 2) / 10e9 + 6 * 5e-6, 2 * size / 2 / 10e9 + 2 * 2 * 5e-6
    hierarchical = Network(**(network.__dict__ | {"algorithm": "hierarchical"}))
    assert all_reduce(hierarchical, size, p) == pytest.approx(within + min(across))
    fastest = min(all_reduce(Network(**(network.__dict__ | {"algorithm": n})), size, p)
                  for n in ("ring", "tree", "hierarchical"))  # fmt: skip
    assert all_reduce(network, size, p) == fastest
    assert all_reduce(network, size, 1) == 0
    assert point_to_point(network, size) == pytest.approx(5e-6 + size / 10e9)
    assert point_to_point(load("h100").network, size) == pytest.approx((6.8 + 5.0) * 1e-6 + size / 47e9)


def test_nccls_published_constants():
    """Latencies of one tiny message, by hand from the published table (µs)."""
    network = load("h100").network
    low_latency, low128, simple = NCCL
    hops = 2 * 4095 - 2 * 511
    assert one(network, "ring", low_latency, 0.0, 4096) == pytest.approx(
        1e-6 * (6.6 + hops * 0.6 * 1.8 + 1022 * 2.7)
    )
    assert one(network, "tree", simple, 0.0, 4096) == pytest.approx(1e-6 * (8.4 + 2 * (7 * 4.0 + 9 * 14)))
    assert one(network, "tree", low128, 0.0, 8) == pytest.approx(1e-6 * (14 + 2 * 7 * 1.25))
    assert bus(network, 1) == 370e9
    assert bus(load("a100").network, 2) == 192e9
    # Ring over one node, large message: 2(n−1)/n · M/β.
    assert one(network, "ring", simple, 1e9, 8) == pytest.approx(2 * 7 / 8 / 370 + 1e-6 * (8.4 + 14 * 3.4))


def test_published_step_times_from_half_of_the_rows():
    rows = calibrate.compare()
    for name, own in rows.groupby("cluster"):
        assert (own["fitted"] == "yes").sum() <= len(own) / 2
        worst = (own["ratio"] - 1).abs().max()
        assert worst <= calibrate.TOLERANCE[name], f"{name}: {worst:.3f}"
        shipped = load(name).of("resnet50")  # the files hold what the fit gives
        assert shipped.fixed_ms == pytest.approx(own["fixed_ms"].iloc[0], rel=1e-3)
        assert shipped.image_ms == pytest.approx(own["image_ms"].iloc[0], rel=1e-3)
    assert len(rows) == 11


def test_the_slowest_of_many_runs_and_hopeless_ones():
    failures = load("h100").failures
    assert interruptions(failures, 8, 0.05).stretch > interruptions(failures, 4096, 0.05).stretch
    calm = load("tpu-like").failures
    assert finish_seconds(100.0, interruptions(calm, 4096, 0.05), runs=3, seed=0).tolist() == [105.0] * 3
    hopeless = load("h100").replace(failures={"device_hours": 0.1, "checkpoint_every": 10**6}).failures
    with pytest.raises(
        ValueError, match=r"checkpoint_every is 1000000: .* allowed: an interval that can finish"
    ):
        interruptions(hopeless, 64, 1.0)


def test_the_best_placement_depends_on_the_images_of_a_device():
    few = best("h100", WORKLOADS["imagenet-resnet50-4k"], devices=512)
    many = best("h100", WORKLOADS["imagenet-resnet50-32k"], devices=64)
    assert few["step_ms"].is_monotonic_increasing
    assert few.iloc[0]["placement"] == "stream"
    assert set(few["placement"]) == {"serial", "stream", "ranks"}
    gains = [
        rows.loc[rows["placement"] == "serial", "step_ms"].iloc[0] / rows["step_ms"].iloc[0]
        for rows in (few, many)
    ]
    assert gains[0] > 1.6
    assert gains[1] < 1.1


def test_a_table_of_all_combinations():
    rows = simulate(
        "a100", "imagenet-resnet50-4k", ["vanilla", "conadv"], devices=[8, 64], placement=["serial", "ranks"]
    )
    assert list(zip(rows["method"], rows["placement"], rows["devices"], rows["attackers"], strict=True)) == [
        ("vanilla", "serial", 8, 0), ("vanilla", "serial", 64, 0), ("conadv", "serial", 8, 0),
        ("conadv", "serial", 64, 0), ("conadv", "ranks", 8, 2), ("conadv", "ranks", 64, 16),
    ]  # fmt: skip
    assert set(rows["kind"]) == {"model"}
    assert (rows["device_hours"] / rows["hours"]).tolist() == pytest.approx(rows["devices"].tolist())
    share = simulate("a100", "imagenet-resnet50-4k", devices=64, placement="ranks", attackers=0.125)
    assert share["attackers"].tolist() == [8]


def test_micro_batches_pay_the_fixed_cost_each():
    assert step_ms("vanilla", 64) == pytest.approx(3.48 + 64 * 0.1434)
    own = step_times(STILL, work(64, 1, micro_batch=16), "vanilla", 1)
    assert 1e3 * own.compute == pytest.approx(4 * 3.48 + 64 * 0.1434)
    # Only the last micro-batch's backward makes gradients ready.
    many = step_times(STILL.replace(network={"bucket_mb": 1.0}), work(64, 2, micro_batch=16), "vanilla", 2)
    backward = 2 / 3 * (3.48 + 16 * 0.1434)
    size = MODELS["resnet50"] * 2 / 1e6
    assert 1e3 * many.ready[0] == pytest.approx(1e3 * many.compute - backward * (1 - 1 / size))


def test_workloads_are_those_of_the_recipes_and_models():
    made = {"digits-cnn": DigitsCNN, "resnet18": resnet18, "resnet20": resnet20, "resnet50": resnet50}
    for name, model in made.items():
        assert sum(p.numel() for p in model().parameters()) == MODELS[name]
    assert workload_of("digits-conadv").images == TRAINING_IMAGES["digits"]
    assert workload_of(RECIPES["cifar10-resnet18-512"]()).steps == round(36 * 50_000 / 512)
    steps = [WORKLOADS[f"imagenet-resnet50-{k}k"].steps for k in (4, 8, 16, 32, 64, 96)]
    assert steps == [28151, 14075, 7038, 3519, 1759, 1173]


@pytest.mark.parametrize("name", names())
def test_clusters_survive_a_trip_through_toml(name):
    cluster = load(name)
    assert parse(to_toml(cluster), name, "text") == cluster
    assert cluster.about


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[network]\nnode_hop_us = -1.0",
            "network.node_hop_us is -1.0; allowed: a finite number of at least 0",
        ),
        ("[network]\ncard_gb = 1.0", "unknown key of .network. in x 'card_gb'.*Did you mean 'card_gbs'"),
        ("[network]\ncard_gbs = 'fast'", "card_gbs in .network. in x is 'fast'; allowed: a number"),
        ("[netwrk]\n", "unknown section of x 'netwrk'.*Did you mean 'network'"),
        ("[compute.resnet50]\nfixed_ms = 1.0", r"\[compute.resnet50\] in x lacks image_ms"),
        ("[compute.resnet50]\nfixed_ms = 0.0\nimage_ms = 0.0", "allowed: fixed_ms or image_ms above 0"),
        ("[stragglers]\nkind = 'normal'", "unknown kind of stragglers 'normal'.*Did you mean 'lognormal'"),
        ("[stragglers]\nslow_factor = 0.5", "stragglers.slow_factor is 0.5; allowed: at least 1"),
        ("[failures]\ncheckpoint_every = 0", "failures.checkpoint_every is 0"),
        ("about =", "x is not valid TOML"),
    ],
)
def test_a_wrong_cluster_file_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, "x", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices is 0; allowed: a whole number of at least 1"),
        ({"devices": 8, "placement": "ranks", "attackers": 8}, "attackers is 8; allowed: 1 to 7"),
        ({"devices": 1, "placement": "ranks"}, "attackers is 1; allowed: none, as one device has to train"),
        ({"devices": 8, "attackers": 2}, "attackers is 2; allowed with placement serial: None"),
        ({"devices": 8, "placement": "steam"}, "unknown placement 'steam'.*Did you mean 'stream'"),
        (
            {"devices": 8, "method": "disadv", "placement": "ranks"},
            "placement is 'ranks'; allowed for disadv: serial, stream",
        ),
        ({"devices": 8, "method": "conad"}, "unknown method 'conad'.*Did you mean 'conadv'"),
        ({"devices": 8, "staleness": -1}, "staleness is -1"),
        ({"devices": 200_000}, "devices that train is 200000; allowed: at most 32768, the images of a step"),
        ({"devices": 8, "method": "asyncsam", "ascent_share": 0.0}, "ascent_share is 0.0"),
    ],
)
def test_a_wrong_plan_says_what_is_wrong(options, message):
    method = options.pop("method", "conadv")
    with pytest.raises(ValueError, match=message):
        step_times(load("h100"), WORKLOADS["imagenet-resnet50-32k"], method, **options)


def test_other_mistakes():
    with pytest.raises(
        ValueError, match=r"cluster h100 has no constants for model 'resnet18'.*--calibrate RUN"
    ):
        simulate("h100", "cifar10-resnet18-512", devices=1)
    with pytest.raises(ValueError, match=r"unknown cluster 'h1000'.*Did you mean 'h100'"):
        load("h1000")
    with pytest.raises(ValueError, match=r"attacker share is 1\.5; allowed: above 0 and below 1"):
        simulate("h100", "imagenet-resnet50-4k", devices=8, placement="ranks", attackers=1.5)
    with pytest.raises(ValueError, match="attackers is 8; allowed with placement serial: None"):
        simulate("h100", "imagenet-resnet50-4k", devices=8, attackers=8)
    with pytest.raises(ValueError, match="placement is 'ranks'; allowed for vanilla: serial, stream"):
        simulate("h100", "imagenet-resnet50-4k", ["vanilla", "sam"], devices=8, placement="ranks")
    with pytest.raises(ValueError, match="steps is 0"):
        simulate("h100", "imagenet-resnet50-4k", devices=8, steps=0)
    with pytest.raises(ValueError, match="slow_devices is 9; allowed: at most 8"):
        simulate(load("h100").replace(stragglers={"slow_devices": 9}), "imagenet-resnet50-4k", devices=8)
