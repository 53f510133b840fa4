"""Captured steps, without a GPU: the operators of a step recorded once and replayed are the step."""

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from conadv_lab.capture.feed import Feed
from conadv_lab.capture.program import Program
from conadv_lab.config import Config, resolved
from conadv_lab.data.augment import augment
from conadv_lab.data.hashing import image_keys
from conadv_lab.data.loader import Stream
from conadv_lab.methods import METHODS, method_of
from conadv_lab.methods.base import Vanilla
from conadv_lab.methods.lanes import Beside, Lanes
from conadv_lab.methods.weight_space import WeightSpace
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.optim.groups import parameter_groups
from conadv_lab.optim.lamb import LAMB
from conadv_lab.optim.lars import LARS
from conadv_lab.optim.momenta import begin_momenta
from conadv_lab.training.weights import Average
from tests.capture.recording import Listening, Recordings
from tests.conftest import image_set, rest_slow, small_cnn

STEPS = 30


@pytest.fixture(autouse=True)
def _nobody_looks(monkeypatch):
    """On a CPU methods in weight space look whether a pass was finite; on a GPU they do not."""
    monkeypatch.setattr(WeightSpace, "_require_finite", lambda *_: None)


CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1)


def sgd(groups: list) -> torch.optim.Optimizer:
    plain = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
    made = torch.optim.SGD(plain, lr=0.1, momentum=0.9, nesterov=True, fused=True)
    made.register_step_pre_hook(begin_momenta)
    return made


OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "lars-A": lambda groups: LARS(groups, lr=2.0, variant="A"),
    "lars-C": lambda groups: LARS(groups, lr=2.0, variant="C"),
    "lamb": lambda groups: LAMB(groups, lr=0.05),
}


class Training:
    """A training of a tiny network, step by step, as the loop takes them; its state can be saved and loaded."""

    def __init__(
        self, method: str, optimizer: str = "sgd", *, captured: bool, mixture: bool = True, **options
    ) -> None:
        options = {"epsilon": 0.1, "micro_batch": 10, **options}
        config = resolved(
            Config().replace(method=method, **{k: v for k, v in options.items() if k != "micro_batch"})
        )
        self.method = method_of(config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = nn.Sequential(nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 4))
        network = small_cnn() if mixture else plain
        self.model = mixture_batch_norm(network)
        new = self.method.new_fraction
        self.stream = Stream(
            image_set(50), seed=5, batch=round(20 * new), first_batch=round(20 * max(1, new)), steps=STEPS,
            micro_batch=options["micro_batch"], augment=self.augmented, replays=getattr(self.method, "replays", 1),
        )  # fmt: skip
        self.optimizer = OPTIMIZERS[optimizer](parameter_groups(self.model, 1e-3))
        self.method.attach(self.optimizer)
        self.average = Average(self.model, 0.9)
        self.backend = Recordings() if captured else None
        device = torch.device("cpu")
        self.feed = Feed(self.stream, self.method.lookahead, device, len(self.optimizer.param_groups))
        self.program = Program(
            self.model, self.model, self.method, self.optimizer, CRITERION, average=self.average,
            rates=self.feed.block.rates, backend=self.backend, required=True,
        )  # fmt: skip
        self.losses: list[float] = []

    def augmented(self, images: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        return augment(images, image_keys(3, "augment", epochs, indices), crop=1, flip=True)

    def take(self, *numbers: int) -> "Training":
        for number in numbers:
            rate = 0.1 / (1 + number)
            step = self.feed.load(number, [rate] * len(self.optimizer.param_groups))
            losses = self.program(step)
            self.losses.append(losses.clean.item())
        return self

    def state(self) -> dict:
        model, average = self.model.state_dict(), self.average.state_dict()
        state = {"model": model, "optimizer": self.optimizer.state_dict(), "average": average}
        return _cloned(state | {"method": self.method.state_dict()})

    def load(self, state: dict) -> "Training":
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.method.load_state_dict(state["method"])
        return self


def _cloned(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _cloned(one) for key, one in value.items()}
    return [_cloned(one) for one in value] if isinstance(value, list) else value


def assert_same(one: Training, other: Training) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    for mine, theirs in zip(one.average.parameters(), other.average.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert one.losses[-5:] == other.losses[-5:]


QUICK = [
    *(
        (method, "sgd")
        for method in ("vanilla", "conadv", "recycled", "free-at", "fast-advprop", "sam", "asyncsam")
    ),
    ("conadv", "lars-C"),
]
PAIRS = [
    *((method, "sgd") for method in METHODS),
    *product(("conadv", "recycled", "sam", "asyncsam", "msam"), ("lars-A", "lars-C", "lamb")),
]
"""Every method once, and one of each kind with every optimizer, which sees nothing of a method but its gradient."""


@cache
def eager(method: str, optimizer: str = "sgd", **options) -> Training:
    return Training(method, optimizer, captured=False, **options).take(*range(STEPS))


@pytest.mark.parametrize("pair", rest_slow(PAIRS, *QUICK), ids="-".join)
def test_replayed_operators_are_the_step(pair):
    """Over cold and warm statistics, changing rates and the last steps; a resume in the middle changes nothing."""
    replayed = Training(*pair, captured=True).take(*range(14))
    begun = replayed.state()
    assert_same(replayed.take(*range(14, STEPS)), eager(*pair))
    assert replayed.backend.replayed >= 8
    resumed = Training(*pair, captured=True).load(begun).take(*range(14, STEPS))
    assert_same(resumed, eager(*pair))


def test_a_method_that_is_not_known_runs_as_it_is_with_one_line():
    class Own(Vanilla):
        def kind(self, step):
            return None

    said: list[str] = []
    training = Training("vanilla", captured=True)
    training.program.method, training.program.required, training.program.told = Own(), False, said.append
    training.take(*range(5))
    assert said == ["steps are not captured: Own does not say which operators a step runs: see Method.kind"]


SETTINGS = rest_slow(
    [
        ("conadv", {"staleness": 3}),
        ("conadv", {"staleness": 3, "first": "clean"}),
        ("conadv", {"attack_steps": 2}),
        ("conadv", {"attack_statistics": "batch", "random_start": False}),
        ("disadv", {"attack_steps": 2, "norm": "l2", "epsilon": 0.5}),
        ("conadv", {"mixture": False}),
        ("recycled", {"mixture": False}),
        ("recycled", {"micro_batch": 5}),
        ("sam", {"perturbation": "micro-batch"}),
        ("extrap", {"perturbation": "micro-batch", "extrapolation": 2.0}),
        ("extrap", {"extrapolate_along": "noise"}),
        ("asyncsam", {"staleness": 3}),
        ("conadv-sam", {"staleness": 0}),
        ("late-sam", {"early_method": "conadv", "late_method": "conadv-sam", "late_share": 0.5}),
    ],
    ("conadv", {"staleness": 3}),
    ("recycled", {"micro_batch": 5}),
    ("extrap", {"extrapolate_along": "noise"}),
)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_of_methods(setting):
    method, options = setting
    replayed = Training(method, captured=True, **options).take(*range(STEPS))
    assert replayed.backend.replayed >= 8
    assert_same(replayed, eager(method, **options))


BESIDE = (
    "disadv", "conadv", "recycled", "recycled-equal", "noise", "copy-equal", "fgsm-rs", "conadv-sam", "recycled-msam",
)  # fmt: skip


@pytest.mark.parametrize("method", rest_slow(BESIDE, "conadv", "recycled"))
def test_passes_beside_one_another_add_up_in_the_same_order(method):
    apart = Training(method, captured=True)
    apart.method.lanes = Beside()
    assert_same(apart.take(*range(STEPS)), eager(method))


def test_the_parts_of_late_sam_have_its_lanes():
    options = {"early_method": "conadv", "late_method": "disadv", "late_share": 0.5}
    apart = Training("late-sam", captured=True, **options)
    apart.method.lanes = Beside()
    assert_same(apart.take(*range(STEPS)), eager("late-sam", **options))
    assert apart.method.early.lanes is apart.method.late.lanes is apart.method.lanes


def operators(training: Training, number: int) -> list:
    """What a step runs, with shapes, numbers and places; the step is taken."""
    step = training.feed.load(number, [0.1] * len(training.optimizer.param_groups))
    training.program.replays.backend = listening = Listening()
    training.program(step)
    (recording,) = listening.recordings
    (operators,) = recording.signature()
    return operators


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_a_kind_run_the_same_operators_on_the_same_tensors(method):
    training = Training(method, captured=True).take(*range(13))
    training.program.replays.graphs.clear()
    training.program.replays.runs.clear()
    first, second = operators(training, 13), operators(training, 14)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one == other


class Planted(nn.Module):
    """A network with a fault of one kind in its forward."""

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind, self.calls = network, kind, 0
        self.buffer = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "read":
            return self.network(x) * (2.0 if x.mean().item() < 9 else 1.0)
        if self.kind == "made":
            return self.network(x) * torch.tensor(1.5)
        if self.kind == "buffer":
            self.buffer = self.buffer + 1
            return self.network(x) * self.buffer
        return self.network(x) * (1 + 1 / self.calls)


def planted(kind: str, captured: bool = True) -> Training:
    training = Training("conadv", captured=captured)
    training.program.network = Planted(training.model, kind)
    return training


@pytest.mark.parametrize(
    ("kind", "why"), [("read", "reads a value back"), ("made", "tensor of the host's numbers")]
)
def test_a_read_or_a_made_tensor_is_refused(kind, why):
    with pytest.raises(ValueError, match=rf"capture is 'on', but .*{why}; allowed: 'auto', 'off'"):
        planted(kind).take(*range(8))


@pytest.mark.parametrize("lanes", [Lanes, Beside])
def test_what_cannot_be_captured_runs_as_it_is_with_one_line(lanes):
    """A pass that failed leaves nothing behind, in batch norm's step nor among the gradients."""
    said: list[str] = []
    training, eager = planted("read"), planted("read", captured=False)
    training.method.lanes = lanes()
    training.program.required, training.program.told = False, said.append
    training.take(*range(12))
    (line,) = said
    assert line.startswith("steps are not captured: aten._local_scalar_dense")
    assert_same(training, eager.take(*range(12)))


@pytest.mark.parametrize("kind", ["buffer", "number"])
def test_a_new_buffer_or_a_changing_number_is_seen_by_recorder_and_replayer(kind):
    training = planted(kind).take(*range(2))
    training.program.replays.graphs.clear()
    training.program.replays.runs.clear()
    assert operators(training, 2) != operators(training, 3)
    replayed = planted(kind).take(*range(9))
    with pytest.raises(AssertionError):
        assert_same(replayed, planted(kind, captured=False).take(*range(9)))
