"""Inputs that are not images in [0, 1]: normalised images, features without bounds, embeddings of tokens."""

import copy
import math

import pytest
import torch
from torch import nn

import conadv_lab as cl
from conadv_lab.data.loader import Batch
from conadv_lab.methods.ball import Ball
from tests.conftest import small_cnn

MEAN, STD, LR = torch.tensor([0.4, 0.55]), torch.tensor([0.2, 0.3]), 0.1
CRITERION = nn.CrossEntropyLoss()


def of_channels(values: torch.Tensor) -> torch.Tensor:
    return values.double().view(1, -1, 1, 1)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn().double()

    def forward(self, images):
        return self.network((images - of_channels(MEAN)) / of_channels(STD))


def trained(model: nn.Module, method, loader, steps: int = 5, **options) -> list[torch.Tensor]:
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    for step in cl.lookahead(loader, steps, method.lookahead, replays=method.replays, **options):
        method.backward(model, step, CRITERION)
        sgd.step()
        sgd.zero_grad()
    return list(model.parameters())


def images(count: int = 3, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    batches = [torch.rand(size, 2, 6, 6, generator=draw, dtype=torch.float64) for _ in range(count)]
    return [(batch.round(decimals=1), torch.arange(size) % 4) for batch in batches]  # many values are 0 or 1


OF_IMAGES = {
    "sign": lambda units: cl.ConAdv(cl.SignAttack(**units(0.1, 0.15)), staleness=2),
    "sign, no start": lambda units: cl.DisAdv(cl.SignAttack(**units(0.1, None), random_start=False)),
    "pgd": lambda units: cl.ConAdv(cl.PGDAttack(**units(0.1, 0.04), steps=3)),
    "recycled": lambda units: cl.Recycled(**units(0.1, None)),
    "recycled-equal": lambda units: cl.Recycled(**units(0.1, None), equal_cost=True),
    "noise": lambda units: cl.Noise(**units(0.1, None)),
    "fgsm-rs": lambda units: cl.FGSMRS(**units(0.1, None), staleness=1),
    "free-at": lambda units: cl.FreeAT(**units(0.1, 0.04), replays=3),
    "fast-advprop": lambda units: cl.FastAdvProp(**units(0.1, 0.15)),
}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_attacking_normalised_images_is_attacking_images_before_they_are_normalised(name):
    """A radius, step and bounds for each channel do what a normalisation within the model does."""

    def plain(epsilon, step):
        return {"epsilon": epsilon} | ({"step": step} if step else {})

    inside, outside = cl.mixture_batch_norm(Normalised()), cl.mixture_batch_norm(Normalised().network)
    loader = images(size=5 if name == "fast-advprop" else 6)
    normalised = [((x - of_channels(MEAN)) / of_channels(STD), y) for x, y in loader]
    one = trained(inside, OF_IMAGES[name](plain), loader)
    other = trained(outside, OF_IMAGES[name](lambda e, s: cl.normalised(e, MEAN, STD.numpy(), s)), normalised)
    assert not torch.equal(one[0], next(iter(Normalised().parameters())))
    for first, second in zip(one, other, strict=True):
        assert torch.allclose(first, second, rtol=0, atol=1e-6 if "start" not in name else 1e-12)


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def features(shape: tuple[int, ...], count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randn(5, *shape, generator=draw, dtype=torch.float64) * 10, torch.arange(5) % 3)
        for _ in range(count)
    ]


def input_gradient(model, inputs, labels):
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(CRITERION(model(inputs), labels), inputs)[0]


def sgd_step(model: nn.Module, loss: torch.Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight -= LR * gradient


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 1, 3, 2)], ids=["rows", "series", "volumes"])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_features_without_bounds_equal_a_literal_rendering(shape, staleness):
    """x + ε_c sign ∇ₓL(x; θ_{max(0, t−τ)}), never clipped, by stored weights."""
    loader, steps = features(shape), 5
    radii = [0.5 + 0.25 * c for c in range(shape[0])]
    attack = cl.SignAttack(radii, random_start=False, bounds=None)
    weights = trained(mlp(), cl.ConAdv(attack, staleness, (0.5, 0.5)), loader, steps)
    model, snapshots = mlp(), []
    radius = torch.tensor(radii, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    for number in range(steps):
        inputs, labels = loader[number % len(loader)]
        snapshots.append(copy.deepcopy(model))
        ascent = input_gradient(snapshots[max(0, number - staleness)], inputs, labels)
        moved = inputs + radius * torch.where(ascent >= 0, 1.0, -1.0)
        sgd_step(model, (CRITERION(model(inputs), labels) + CRITERION(model(moved), labels)) / 2)
    for weight, literal in zip(weights, model.parameters(), strict=True):
        assert torch.allclose(weight, literal, rtol=0, atol=1e-12)


def test_recycled_features_in_the_l2_ball_equal_a_literal_rendering():
    loader, steps = features((12,)), 5
    method = cl.Recycled(2.0, weights=(0.5, 0.5), bounds=None, norm="l2")
    weights = trained(mlp(), method, loader, steps)
    model, moved, before = mlp(), None, None
    for number in range(steps):
        inputs, labels = loader[number % len(loader)]
        ascent = input_gradient(model, inputs, labels)
        loss = CRITERION(model(inputs), labels)
        if moved is not None:
            loss = (loss + CRITERION(model(moved), before)) / 2
        sgd_step(model, loss)
        moved, before = inputs + 2.0 * ascent / ascent.norm(dim=1, keepdim=True), labels
    for weight, literal in zip(weights, model.parameters(), strict=True):
        assert torch.allclose(weight, literal, rtol=0, atol=1e-12)


class Reader(nn.Module):
    """A token model: the mean over what is no padding, of a layer that mixes neighbouring tokens."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(20, 6)
            self.mix, self.head = nn.Conv1d(6, 8, 3, padding=1), nn.Linear(8, 3)
        self.double()

    def forward(self, input_ids, attention_mask):
        return self.after(self.embedding(input_ids), attention_mask)

    def after(self, embeddings, mask):
        mask = mask.unsqueeze(-1).double()
        hidden = self.mix((embeddings * mask).transpose(1, 2)).transpose(1, 2).tanh() * mask
        return {"logits": self.head(hidden.sum(1) / mask.sum(1))}


def texts(count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches whose lengths differ, and within them those of the examples."""
    draw = torch.Generator().manual_seed(4)
    batches = []
    for number in range(count):
        longest = 5 + number
        lengths = torch.randint(2, longest + 1, (5,), generator=draw)
        batches.append(
            {
                "input_ids": torch.randint(0, 20, (5, longest), generator=draw),
                "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long(),
                "labels": torch.arange(5) % 3,
            }
        )
    return batches


def freelb_ascent(model: Reader, batch: dict[str, torch.Tensor], epsilon: float, step: float, steps: int):
    """δ ← Π(δ + α g / ‖g‖), g of each example over all its tokens (Zhu et al. 2020, Algorithm 1), from δ = 0."""
    embeddings = model.embedding(batch["input_ids"]).detach()
    delta = torch.zeros_like(embeddings)
    for _ in range(steps):
        delta.requires_grad_()
        loss = CRITERION(model.after(embeddings + delta, batch["attention_mask"])["logits"], batch["labels"])
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach()
        for row in range(len(delta)):
            delta[row] += step * gradient[row] / gradient[row].norm()
            delta[row] *= min(1.0, epsilon / delta[row].norm().item())
    return delta


def losses_at(model: Reader, batch: dict[str, torch.Tensor], delta=None) -> torch.Tensor:
    embeddings = model.embedding(batch["input_ids"])
    moved = embeddings if delta is None else embeddings + delta
    return CRITERION(model.after(moved, batch["attention_mask"])["logits"], batch["labels"])


@pytest.mark.parametrize(("staleness", "k"), [(0, 1), (0, 3), (1, 1), (2, 3)])
def test_attacked_embeddings_equal_a_literal_freelb_by_snapshots(staleness, k):
    loader, steps, model = texts(), 6, Reader()
    attack = cl.PGDAttack(0.6, 0.4, random_start=False, steps=k, norm="l2", bounds=None)
    weights = trained(
        model, cl.ConAdv(attack, staleness, (0.5, 0.5)), loader, steps, embeddings=model.embedding
    )
    literal, snapshots = Reader(), []
    for number in range(steps):
        batch = loader[number % len(loader)]
        snapshots.append(copy.deepcopy(literal))
        delta = freelb_ascent(snapshots[max(0, number - staleness)], batch, 0.6, 0.4, k)
        sgd_step(literal, (losses_at(literal, batch) + losses_at(literal, batch, delta)) / 2)
    for weight, other in zip(weights, literal.parameters(), strict=True):
        assert torch.allclose(weight, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("equal", [False, True])
def test_recycled_embeddings_equal_a_literal_rendering(equal):
    loader, steps, model = texts(), 6, Reader()
    method = cl.Recycled(0.6, equal, (0.5, 0.5), bounds=None, norm="l2")
    weights = trained(model, method, loader, steps, embeddings=model.embedding)
    literal, before, delta = Reader(), None, None
    for number in range(steps):
        batch = loader[number % len(loader)]
        ascent = freelb_ascent(literal, batch, 0.6, 0.6, 1)
        loss = losses_at(literal, batch)
        if before is not None:
            loss = (loss + losses_at(literal, before, delta)) / 2
        sgd_step(literal, loss)
        before, delta = batch, ascent
    for weight, other in zip(weights, literal.parameters(), strict=True):
        assert torch.allclose(weight, other, rtol=0, atol=1e-12)


def test_signs_and_plain_ids_work_on_embeddings_too():
    class Plain(Reader):
        def forward(self, ids):
            return super().forward(ids, torch.ones_like(ids))

    model, plain = Plain(), Plain()
    loader = [(batch["input_ids"], batch["labels"]) for batch in texts(1)]
    clean = trained(plain, cl.Vanilla(), loader, embeddings=plain.embedding)
    method = cl.ConAdv(cl.SignAttack(0.1, bounds=None))
    weights = trained(model, method, loader, embeddings=model.embedding)
    assert method.kept_bytes(5) == 2 / 8
    assert not torch.allclose(weights[0], clean[0], atol=1e-3)


def test_a_random_start_leaves_padding_alone():
    model, (batch,) = Reader(), texts(1)
    attack = cl.PGDAttack(0.5, steps=1, norm="l2", bounds=None, seed=7)
    (step,) = cl.lookahead([batch], steps=1, embeddings=model.embedding)
    (own,) = step.batches()
    start = attack._start(own)
    mask = batch["attention_mask"].bool()
    assert start[~mask].abs().max() == 0
    assert start[mask].abs().min() > 0
    assert (start.flatten(1).norm(dim=1) <= 0.5 * (1 + 1e-6)).all()


def test_micro_batches_of_one_step_must_be_padded_alike():
    model = Reader()
    method = cl.ConAdv(cl.PGDAttack(0.5, steps=1, norm="l2", bounds=None))
    with pytest.raises(
        ValueError, match=r"shapes \(5, 6\) and \(6, 6\); allowed: one shape, .* or padded tokens"
    ):
        trained(model, method, texts(), 2, accumulate=2, embeddings=model.embedding)


def test_equal_values_in_all_channels_are_a_number():
    batch = Batch(torch.rand(4, 2, 3, 3), torch.arange(4), torch.zeros(4).long(), torch.arange(4), 1.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    one, other = cl.SignAttack(0.1), cl.SignAttack([0.1, 0.1], bounds=([0.0, 0.0], 1.0))
    moved = [a.apply(batch, a.perturb(model, batch, CRITERION)) for a in (one, other)]
    assert torch.allclose(*moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [lambda: cl.ConAdv(cl.SignAttack(0.1)), lambda: cl.DisAdv(cl.PGDAttack(0.1)), lambda: cl.Recycled(0.1),
     lambda: cl.Noise(0.1), lambda: cl.FreeAT(0.1, replays=1), lambda: cl.FGSMRS(0.1)],
)  # fmt: skip
@pytest.mark.parametrize("low_high", [(-3.0, 3.0), (0.0, 255.0), (math.nan, math.nan)])
def test_images_outside_the_bounds_are_refused_with_what_mends_it(make, low_high):
    loader = [(torch.linspace(*low_high, 64).view(4, 1, 4, 4), torch.arange(4))]
    model, before = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"images lie in \[.*\]; allowed: \[0, 1\].*; move the normalisation.*, mean, std\)\), or bounds=None",
    ):
        trained(model, make(), loader, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [lambda: cl.ConAdv(cl.SignAttack(0.1)), lambda: cl.DisAdv(cl.PGDAttack(0.1)), lambda: cl.Recycled(0.1),
     lambda: cl.Noise(0.1), lambda: cl.FreeAT(0.1, replays=1), lambda: cl.FGSMRS(0.1)],
)  # fmt: skip
def test_bounds_of_images_are_refused_for_embeddings(make):
    model = Reader()
    with pytest.raises(ValueError, match=r"bounds is \(0.0, 1.0\); allowed: None with embeddings="):
        trained(model, make(), texts(1), 1, embeddings=model.embedding)


@pytest.mark.parametrize("lengths", [(6, 8), (8, 6)])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 6), (6, 4)])
def test_free_at_refuses_images_of_another_shape(lengths, sizes):
    loader = [(torch.rand(n, 1, k, k), torch.arange(n) % 4) for n, k in zip(sizes, lengths, strict=True)]
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4))
    with pytest.raises(ValueError, match=r"shape is \(1, \d, \d\); allowed: \(1, \d, \d\) in every step"):
        trained(model, cl.FreeAT(0.1, replays=1), loader, 2)


def test_a_method_that_moves_no_image_takes_any():
    loader = [(torch.randn(4, 1, 4, 4) * 9, torch.arange(4))]
    for method in (cl.Vanilla(), cl.SAM(0.05)):
        trained(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), method, loader, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cl.SignAttack([0.1, 1.2]), r"epsilon is 1.2; allowed: 0 to 1, as images are in \[0, 1\]"),
        (lambda: cl.SignAttack(300, bounds=(0, 255)), "epsilon is 300; allowed: 0 to 255"),
        (lambda: cl.SignAttack(-1, bounds=None), "epsilon is -1; allowed: a number of at least 0"),
        (lambda: cl.SignAttack("0.1"), "epsilon is '0.1'; allowed: a number, or one value per channel"),
        (lambda: cl.SignAttack([0.1, 0.2], [0.1] * 3), "epsilon's number of channels is 2; allowed: 3"),
        (lambda: cl.SignAttack(0.1, bounds=(1, 0)), r"bounds is \(1, 0\); allowed: the lowest value below"),
        (lambda: cl.SignAttack(0.1, bounds=3), r"bounds is 3; allowed: \(lowest, highest\)"),
        (lambda: cl.PGDAttack([0.1, 0.2], norm="l2"), "allowed: a number with norm 'l2'"),
        (lambda: cl.normalised(0.1, 0.5, [0.2, 0.0]), "std is .*; allowed: numbers above 0"),
        (lambda: cl.normalised(-0.1, 0.5, 0.2), "epsilon is -0.1; allowed: a number of at least 0"),
        (lambda: Ball([0.1] * 3).project(torch.zeros(4, 2, 3, 3)), r"shape \(4, 2, 3, 3\); allowed: \(B, 3, …\)"),
    ],
)  # fmt: skip
def test_impossible_balls_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("batch", "layer", "message"),
    [
        ({"input_ids": torch.zeros(2, 3)}, None, "a batch has the keys input_ids; allowed: one of labels"),
        ({"ids": torch.zeros(2, 3), "labels": torch.zeros(2)}, None, "has the keys ids, labels; allowed: 'input_ids'"),
        ((torch.zeros(2, 3), torch.zeros(2)), None, r"token ids are torch.float32 of shape \(2, 3\)"),
        ((torch.zeros(2, 3).long(), torch.zeros(3)), None, "allowed: integer ids .m, T., with m labels"),
        ((torch.zeros(2, 3).long(), torch.zeros(2)), nn.Tanh(), "embeddings is a Tanh; allowed: the model's"),
        ((torch.zeros(2, 3).long(), torch.zeros(2).long()), nn.Embedding(4, 2), "did not call the layer passed"),
    ],
)  # fmt: skip
def test_what_is_no_batch_of_tokens_is_refused(batch, layer, message):
    model = nn.Sequential(nn.Embedding(4, 6), nn.Flatten(), nn.Linear(18, 3))
    with pytest.raises(ValueError, match=message):
        trained(model, cl.Vanilla(), [batch], 1, embeddings=layer or model[0])


def test_token_ids_without_a_layer_are_refused_with_the_argument_that_takes_them():
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], or token ids with lookahead\(…, embeddings="):
        next(cl.lookahead([(torch.zeros(2, 3).long(), torch.zeros(2))], steps=1))


def test_a_batch_without_images_is_refused():
    with pytest.raises(ValueError, match="the number of images in a batch is 0; allowed: at least 1"):
        next(cl.lookahead([(torch.zeros(0, 3, 8, 8), torch.zeros(0).long())], steps=1))
