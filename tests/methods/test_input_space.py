"""AdvProp, fast AdvProp, FreeAT and FGSM-RS against literal float64 renderings of their papers' definitions."""

import pytest
import torch
from torch import Tensor, nn

from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import PGDAttack
from conadv_lab.methods.families.advprop import AdvProp, FastAdvProp
from conadv_lab.methods.families.conadv import ConAdv
from conadv_lab.methods.families.robust import FGSMRS, FreeAT
from conadv_lab.methods.targets import TargetedAttack
from conadv_lab.models.norm import mixture_batch_norm
from tests.conftest import double, image_set, small_cnn
from tests.methods import input_space_oracles as oracles
from tests.methods.input_space_oracles import DECAY, LR, MOMENTUM, SMOOTHING, World

STEPS, BATCH, EPSILON = 20, 16, 0.1
CRITERION = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)


def stream(method, micro_batch: int | None = None, batch: int = BATCH, augment=double) -> Stream:
    """50 images, so that steps begin in one epoch and end in the next."""
    return Stream(
        image_set(50), seed=5, batch=batch, steps=STEPS, micro_batch=micro_batch, augment=augment,
        replays=method.replays,
    )  # fmt: skip


def model_of() -> nn.Module:
    """Both branches of batch norm differ from the start, so that what goes through the wrong one is seen."""
    model = mixture_batch_norm(small_cnn()).double()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "adversarial" in name:
            parameter.data += 0.2 * torch.rand(parameter.shape, generator=draw)
    return model


def trained(method, steps: Stream) -> nn.Module:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for number in range(STEPS):
        method.backward(model, steps.step(number, method.lookahead), CRITERION)
        optimizer.step()
        optimizer.zero_grad()
    return model


def groups_of(steps: Stream, number: int) -> list[oracles.Group]:
    return [(b.images, b.labels, b.epochs, b.indices) for b in steps.step(number).batches()]


def assert_close(model: nn.Module, world: World) -> None:
    state: dict[str, Tensor] = model.state_dict()
    expected = {name: value.detach() for name, value in (world.weights | world.running).items()}
    assert expected.keys() == {name for name in state if "num_batches" not in name}
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


PGD = {"count": 3, "epsilon": EPSILON, "alpha": 0.04}


@pytest.mark.parametrize(
    ("tau", "target", "weights", "micro_batch"),
    [
        (0, "true", (0.5, 0.5), 4), (1, "true", (1, 1), 16), (3, "random", (0.5, 0.5), 16),
        (0, "random", (1, 1), 4), (0, "least-likely", (0.5, 0.5), 16), (2, "least-likely", (1, 0.5), 4),
    ],
)  # fmt: skip
def test_advprop_is_its_definition(tau, target, weights, micro_batch):
    attack = (
        PGDAttack(EPSILON, 0.04, steps=3)
        if target == "true"
        else TargetedAttack(EPSILON, 0.04, steps=3, target=target)
    )
    method = AdvProp(attack, tau, weights)
    steps = stream(method, micro_batch)
    data = [groups_of(steps, t) for t in range(STEPS)]
    world = oracles.advprop(World.of(model_of().state_dict()), data, tau, weights, target=target, **PGD)
    assert_close(trained(method, steps), world)


def test_stale_advprop_is_conadv_with_pgd():
    methods = (kind(PGDAttack(EPSILON, 0.04, steps=2), 1, (0.5, 0.5)) for kind in (AdvProp, ConAdv))
    one, other = (trained(method, stream(method, 8)).state_dict() for method in methods)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("micro_batch", [20, 10])
def test_fast_advprop_is_its_definition(micro_batch):
    """Sums over images and the weights that each parameter has seen, as the authors compute it."""
    method = FastAdvProp(EPSILON, 0.08)
    steps = stream(method, micro_batch, 20)
    data = [groups_of(steps, t) for t in range(STEPS)]
    world = oracles.fast_advprop(World.of(model_of().state_dict()), data, EPSILON, 0.08)
    assert_close(trained(method, steps), world)


@pytest.mark.parametrize(("replays", "micro_batch"), [(1, 16), (3, 4), (4, 16)])
def test_free_at_is_its_algorithm(replays, micro_batch):
    method = FreeAT(EPSILON, 0.06, replays)
    steps = stream(method, micro_batch)
    fresh = [groups_of(steps, t) for t in range(0, STEPS, replays)]
    world = oracles.free_at(World.of(model_of().state_dict()), fresh, STEPS, replays, EPSILON, 0.06)
    assert_close(trained(method, steps), world)


@pytest.mark.parametrize(("tau", "micro_batch"), [(0, 4), (1, 16), (3, 4)])
def test_fgsm_rs_is_its_definition(tau, micro_batch):
    method = FGSMRS(EPSILON, staleness=tau)
    steps = stream(method, micro_batch)
    data = [groups_of(steps, t) for t in range(STEPS)]
    world = oracles.fgsm_rs(World.of(model_of().state_dict()), data, tau, EPSILON, 1.25 * EPSILON)
    assert_close(trained(method, steps), world)


def of_channels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


RANGES = {
    "pixels": (lambda images: images * 255, 25.5, 12.0, (0.0, 255.0)),
    "normalised": (
        lambda images: (images - of_channels(0.4, 0.6)) / of_channels(0.25, 0.5),
        of_channels(0.4, 0.2), of_channels(0.28, 0.13), (of_channels(-1.6, -1.2), of_channels(2.4, 0.8)),
    ),
    "unbounded": (lambda images: images * 8 - 4, of_channels(0.9, 0.3), of_channels(0.5, 0.2), None),
}  # fmt: skip
"""How images get there, ε, α and bounds, in each range's own units."""


@pytest.mark.parametrize("alpha", ["given", "default"])
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("kind", [FGSMRS, FreeAT, FastAdvProp])
def test_they_are_their_definitions_in_other_ranges(kind, name, alpha):
    """ε, α and bounds of each channel, and no clipping where there are none."""
    change, epsilon, step, bounds = RANGES[name]
    step = step if alpha == "given" else epsilon * (1.25 if kind is FGSMRS else 1.0)
    method = kind(epsilon, step if alpha == "given" else None, bounds=bounds)
    steps = stream(method, 5, 20, lambda images, *_: change(images.double()))
    data = [groups_of(steps, t) for t in range(0, STEPS, method.replays)]
    assert bounds is None or (data[0][0][0] < bounds[0] + epsilon).any()  # some attacks are clipped
    world, edges = World.of(model_of().state_dict()), bounds or (float("-inf"), float("inf"))
    if kind is FGSMRS:
        oracles.fgsm_rs(world, data, 0, epsilon, step, edges)
    elif kind is FreeAT:
        oracles.free_at(world, data, STEPS, method.replays, epsilon, step, edges)
    else:
        oracles.fast_advprop(world, data, epsilon, step, edges)
    assert_close(trained(method, steps), world)


def test_a_channel_may_have_no_radius():
    """Its step is then 0 too."""
    for kind in (FGSMRS, FreeAT, FastAdvProp):
        method = kind((0.0, 0.1))
        ball = method.ball if kind is FreeAT else method.attack.ball
        moved = ball.moved(torch.full((1, 2, 1, 1), 0.5), ball.along(torch.ones(1, 2, 1, 1)))
        assert moved.flatten().tolist() == pytest.approx([0.5, 0.6])


def test_they_differ():
    """The tests above could not fail if neither target, staleness nor replays made a difference."""
    methods = [
        AdvProp(PGDAttack(EPSILON, 0.04, steps=3)), AdvProp(PGDAttack(EPSILON, 0.04, steps=3), 1),
        AdvProp(TargetedAttack(EPSILON, 0.04, steps=3)),
        AdvProp(TargetedAttack(EPSILON, 0.04, steps=3, target="least-likely")),
        FGSMRS(EPSILON), FGSMRS(EPSILON, staleness=1), FreeAT(EPSILON, replays=2), FreeAT(EPSILON, replays=4),
    ]  # fmt: skip
    ends = [torch.cat([p.detach().flatten() for p in trained(m, stream(m)).parameters()]) for m in methods]
    assert len({tuple(end.tolist()) for end in ends}) == len(methods)
