"""Other people's models, losses and loops: networks that write into their input, outputs that are no tensor, crops."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import conadv_lab as cl
from conadv_lab.data.loader import Batch
from conadv_lab.methods.forwards import outputs_of
from conadv_lab.methods.steps import train_on_both
from conadv_lab.models.mixture import RowsMultiplied
from conadv_lab.models.norm import branch_of, mixture_batch_norm, one_update
from tests.conftest import small_cnn

ATTACK = cl.SignAttack(0.1)
METHODS = {
    "vanilla": cl.Vanilla,
    "disadv": lambda: cl.DisAdv(ATTACK),
    "conadv": lambda: cl.ConAdv(ATTACK, staleness=2),
    "conadv-pgd": lambda: cl.ConAdv(cl.PGDAttack(0.1, steps=2)),
    "recycled": lambda: cl.Recycled(0.1),
    "recycled-equal": lambda: cl.Recycled(0.1, equal_cost=True),
    "noise": lambda: cl.Noise(0.1),
    "copy-equal": lambda: cl.Copy(equal_cost=True),
}
EQUAL = ["recycled-equal", "copy-equal"]


def loader(batches: int = 5, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 2, 6, 6, generator=draw), torch.randint(0, 4, (size,), generator=draw))
        for _ in range(batches)
    ]


def trained(model: nn.Module, method, data=None, criterion=None, optimizer=None, steps: int = 5):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    data = loader() if data is None else data
    for step in cl.lookahead(data, steps=steps, ahead=method.lookahead):
        losses = method.backward(model, step, criterion or nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict() | {"loss": losses.clean}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for (name, value), twin in zip(one.items(), other.values(), strict=True):
        assert torch.equal(value, twin), name


class Centred(nn.Module):
    """Subtracts the mean from its input, in place as torch's own ``inplace=True`` does, or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sub_":
            return x.sub_(0.5)
        if self.how == "data":
            x.data.sub_(0.5)
            return x
        if self.how == "clamp_":
            return x.clamp_(0, 1) - 0.5
        return (x.clamp(0, 1) if self.how == "clamp" else x) - 0.5


@pytest.mark.parametrize("how", ["sub_", "data", "clamp_"])
@pytest.mark.parametrize("name", METHODS)
def test_a_forward_that_writes_into_its_input_trains_as_one_that_does_not(name, how):
    data, kept = loader(), loader()
    plain = "clamp" if how == "clamp_" else "none"
    one, other = (mixture_batch_norm(nn.Sequential(Centred(kind), small_cnn())) for kind in (how, plain))
    assert_same(trained(one, METHODS[name](), data), trained(other, METHODS[name](), kept))
    for (images, _), (before, _) in zip(data, loader(), strict=True):
        assert torch.equal(images, before)


def test_a_forward_that_writes_nothing_gets_the_images_themselves_after_its_first():
    seen: list[Tensor] = []
    model, images = nn.Sequential(nn.Identity()), torch.rand(2, 3)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for _ in range(3):
        outputs_of(model, images)
    outputs_of(model.eval(), images)
    assert [one is images for one in seen] == [False, True, True, False]


class Wrapped(nn.Module):
    """A network whose output is something else than a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network, self.kind = small_cnn(), kind

    def forward(self, x: Tensor):
        out = self.network(x)
        if self.kind == "tuple":
            return out, x.mean()
        if self.kind == "dict":
            return {"features": x, "logits": out}
        if self.kind == "object":
            return SimpleNamespace(logits=out)
        return (out, x) if self.training else out  # as Inception does


@pytest.mark.parametrize("kind", ["tuple", "dict", "object", "training"])
@pytest.mark.parametrize("name", METHODS)
def test_the_logits_of_an_output_are_judged(name, kind):
    plain = mixture_batch_norm(nn.ModuleDict({"network": small_cnn()}))
    plain.forward = lambda x: plain["network"](x)
    wrapped = mixture_batch_norm(Wrapped(kind))
    assert_same(trained(wrapped, METHODS[name]()), trained(plain, METHODS[name]()))


@pytest.mark.parametrize("name", METHODS)
def test_a_criterion_that_takes_all_of_an_output_gets_it(name):
    class TwoHeads(nn.Module):
        def __init__(self, tuples: bool) -> None:
            super().__init__()
            self.network, self.tuples = small_cnn(classes=8), tuples

        def forward(self, x: Tensor):
            out = self.network(x)
            return tuple(out.split(4, 1)) if self.tuples else out

    def halves(outputs, labels: Tensor) -> Tensor:
        one, two = outputs if isinstance(outputs, tuple) else outputs.split(4, 1)
        return nn.functional.cross_entropy(one, labels) + 0.3 * nn.functional.cross_entropy(two, labels)

    one, other = (mixture_batch_norm(TwoHeads(tuples)) for tuples in (True, False))
    assert_same(
        trained(one, METHODS[name](), criterion=halves), trained(other, METHODS[name](), criterion=halves)
    )


def test_an_output_without_a_tensor_is_refused():
    class Words(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "words"

    with pytest.raises(ValueError, match="the model returned str; allowed: a tensor, a tuple"):
        trained(Words(), cl.Vanilla(), optimizer=object())


class Crops(nn.Module):
    """Three crops of each image in the batch: one image after another, or one crop after another."""

    def __init__(self, image_by_image: bool) -> None:
        super().__init__()
        self.network, self.image_by_image = small_cnn(), image_by_image

    def forward(self, x: Tensor) -> Tensor:
        crops = torch.stack([x, x.flip(-1), x.roll(1, -2)], 1 if self.image_by_image else 0)
        outputs = self.network(crops.flatten(0, 1)).view(*crops.shape[:2], -1)
        return outputs.mean(1 if self.image_by_image else 0)


@pytest.mark.parametrize("image_by_image", [True, False])
def test_no_row_of_an_equal_cost_step_goes_through_the_wrong_branch(image_by_image):
    """Against the two branches as two networks, two micro-batches a step, over two steps."""
    model = mixture_batch_norm(Crops(image_by_image).double())
    clean_net, other_net = (copy.deepcopy(model) for _ in range(2))
    draw = torch.Generator().manual_seed(1)
    batches = [
        Batch(torch.rand(5, 2, 6, 6, generator=draw).double(), torch.randint(0, 4, (5,), generator=draw),
              torch.zeros(5).long(), torch.arange(5), 0.5)
        for _ in range(4)
    ]  # fmt: skip
    criterion = nn.CrossEntropyLoss()
    for _ in range(2):
        model.zero_grad()
        with one_update(model):
            for pair in (batches[:2], batches[2:]):
                train_on_both(model, *pair, criterion, (0.25, 0.75))
        for net, branch, parts, weight in (
            (clean_net, "main", batches[::2], 0.25), (other_net, "adversarial", batches[1::2], 0.75),
        ):  # fmt: skip
            net.zero_grad()
            with one_update(net):
                for batch in parts:
                    with branch_of(net, branch):
                        (criterion(net(batch.images), batch.labels) * weight * 0.5).backward()
    gradients = zip(model.parameters(), clean_net.parameters(), other_net.parameters(), strict=True)
    for got, one, other in gradients:
        expected = sum(p.grad for p in (one, other) if p.grad is not None)
        assert torch.allclose(got.grad, expected, rtol=0, atol=1e-12)
    for name, value in model.state_dict().items():
        expected = (other_net if ".adversarial." in name else clean_net).state_dict()[name]
        assert torch.allclose(value, expected, rtol=0, atol=1e-12), name


def test_a_norm_used_again_on_other_rows_is_refused_where_its_statistics_cannot_be_taken_back():
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([self.norm(self.norm(x)), x])).mean((2, 3))[: len(x)]

    model = mixture_batch_norm(Again())
    with pytest.raises(RowsMultiplied, match="a batch norm sees 24 rows for 12 images"):
        trained(
            model, cl.Copy(equal_cost=True), criterion=lambda out, y: nn.functional.cross_entropy(out, y % 2)
        )


def made_too_early() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return mixture_batch_norm(model), optimizer


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "vanilla"])
def test_an_optimizer_without_the_adversarial_branch_is_refused(name, to_none):
    """At the step after the first one that trains on altered images."""
    model, optimizer = made_too_early()
    method, taken = METHODS[name](), 0
    with pytest.raises(ValueError, match="the optimizer lacks parameters of the adversarial branch"):  # noqa: PT012
        for step in cl.lookahead(loader(), steps=5, ahead=method.lookahead):
            method.backward(model, step, nn.CrossEntropyLoss())
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            taken += 1
    first_trains_on_both = not name.startswith("recycled") and name not in EQUAL
    assert taken == (1 if first_trains_on_both else 2)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_an_optimizer_with_both_branches_is_not(name, every, to_none):
    """Gradients may also gather over several steps."""
    model, method = mixture_batch_norm(small_cnn()), METHODS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in cl.lookahead(loader(), steps=7, ahead=method.lookahead):
        method.backward(model, step, nn.CrossEntropyLoss())
        if step.number % every == every - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize(
    ("step", "criterion", "message"),
    [
        (
            (torch.rand(2, 1, 8, 8), torch.zeros(2).long()),
            nn.CrossEntropyLoss(),
            "step is of type tuple; allowed: what iterating",
        ),
        (None, nn.CrossEntropyLoss, r"the criterion is the class CrossEntropyLoss; allowed: an object"),
        (None, "ce", r"the criterion is 'ce'; allowed: an object, such as torch.nn.CrossEntropyLoss\(\)"),
    ],
)
@pytest.mark.parametrize("method", [cl.Vanilla(), cl.ConAdv(cl.SignAttack(0.1)), cl.Recycled(0.1), cl.SAM()])
def test_what_is_no_step_or_no_criterion_is_refused(method, step, criterion, message):
    steps = cl.lookahead([(torch.rand(2, 1, 8, 8), torch.zeros(2).long())], 1, method.lookahead)
    with pytest.raises(ValueError, match=message):
        method.backward(mixture_batch_norm(small_cnn()), step or next(steps), criterion)


def test_a_criterion_that_fails_says_on_what():
    images, labels = torch.rand(4, 2, 6, 6), torch.zeros(4)
    step = next(cl.lookahead([(images, labels)], 1))
    with pytest.raises(
        ValueError, match=r"the criterion fails on outputs float32 \(4, \d+\) and labels float32 \(4,\): "
    ):
        cl.Vanilla().backward(small_cnn(), step, nn.CrossEntropyLoss())


@pytest.mark.parametrize("weights", [0.5, (1,), "ab", (0, 0), (-1, 1)])
def test_what_are_no_loss_weights_is_refused(weights):
    with pytest.raises(ValueError, match=r"weights is .*; allowed: two numbers of at least 0, not both 0"):
        cl.ConAdv(cl.SignAttack(0.1), weights=weights)


@pytest.mark.parametrize("attack", [0.03, None, cl.SignAttack])
@pytest.mark.parametrize("method", [cl.ConAdv, cl.DisAdv])
def test_what_is_no_attack_is_refused(method, attack):
    named = "0.03" if attack == 0.03 else "1/255"
    with pytest.raises(ValueError, match=rf"attack is .*; allowed: an attack, such as .*epsilon={named}\)"):
        method(attack)
