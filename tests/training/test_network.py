"""Compiled networks: each kind of forward is compiled once, however many micro-batches and steps there are."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from conadv_lab.config import Config, Model, resolved
from conadv_lab.data.loader import Stream
from conadv_lab.methods.attack import SignAttack
from conadv_lab.methods.base import Vanilla
from conadv_lab.methods.families.conadv import ConAdv, DisAdv
from conadv_lab.methods.families.controls import Copy
from conadv_lab.methods.families.recycled import Recycled
from conadv_lab.models.norm import mixture_batch_norm
from conadv_lab.training.loop import prepare
from conadv_lab.training.network import Autocast, begin_step, network_of
from tests.conftest import image_set, rest_slow, small_cnn

STEPS = 13

# The forwards are: main, adversarial, and the attack's with the batch's and, later, with running statistics.
CASES = {
    "vanilla": (Vanilla, 1),
    "disadv": (lambda: DisAdv(SignAttack(0.1)), 4),
    "conadv": (lambda: ConAdv(SignAttack(0.1), 2), 4),
    "recycled": (lambda: Recycled(0.1), 2),
    "copy": (lambda: Copy(), 2),
    "recycled-equal": (lambda: Recycled(0.1, equal_cost=True), 2),
}


GRAPHS = Model(compile=True, compile_mode="reduce-overhead")


def trained(
    network: nn.Module, model: nn.Module, method, micro_batch: int, section: Model | None = None
) -> nn.Module:
    batch, device = round(16 * method.clean_fraction), next(model.parameters()).device
    steps = Stream(
        image_set(64).to(device),
        seed=0,
        batch=batch,
        first_batch=16,
        steps=STEPS,
        micro_batch=min(micro_batch, batch),
        augment=lambda images, epochs, indices: images.to(next(model.parameters()).dtype),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(STEPS):
        begin_step(section or Model())
        method.backward(network, steps.step(number, method.lookahead), nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("micro_batch", rest_slow([16, 4], 4))
@pytest.mark.parametrize("name", rest_slow(CASES, "conadv", "recycled-equal"))
def test_no_forward_is_compiled_twice(name, micro_batch):
    make, kinds = CASES[name]
    torch.compiler.reset()
    counter = CompileCounter()
    model, plain = mixture_batch_norm(small_cnn()), mixture_batch_norm(small_cnn())
    compiled = torch.compile(Autocast(model, "cpu"), backend=counter, fullgraph=True)
    trained(compiled, model, make(), micro_batch)
    assert counter.frame_count == kinds
    trained(Autocast(plain, "cpu"), plain, make(), micro_batch)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_what_a_compiled_forward_writes_to_stays_in_place():
    """The batch statistics: around an input that may move, torch makes no CUDA graph."""
    written, moving = [], []

    def compiler(graph, _inputs):
        about = torch._guards.TracingContext.get().fw_metadata
        written.append(len(about.mutated_inp_runtime_indices))
        moving.extend(set(about.mutated_inp_runtime_indices) - set(about.static_input_indices))
        return graph

    torch.compiler.reset()
    model = mixture_batch_norm(small_cnn())
    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=compiler, bw_compiler=lambda graph, _: graph
    )
    trained(torch.compile(model, backend=backend), model, Copy(), 16)
    assert written == [4, 4]  # mean and variance of two norms, in the forward of each branch
    assert not moving


def test_the_mode_reaches_torch_and_each_step_is_begun(tmp_path, monkeypatch):
    modes, begun = [], []
    monkeypatch.setattr(torch, "compile", lambda network, mode: (modes.append(mode), network)[1])
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    config = Config().replace(
        dataset="synthetic", synthetic_images=64, synthetic_pixels=8, model="resnet20", method="vanilla",
        global_batch=8, steps=3, bn_recalibrate=0, device="cpu", threads=1, compile=True,
    )  # fmt: skip
    for mode in ("default", "reduce-overhead"):
        run = prepare(config.replace(compile_mode=mode), tmp_path / mode, progress="none")
        run.start()
        for _ in range(3):
            run.train_step()
    assert modes == ["default", "reduce-overhead"]
    assert len(begun) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compile_mode": "max-autotune"},
            "compile_mode is 'max-autotune'; allowed without compile: 'default'",
        ),
        (
            {"compile": True, "compile_mode": "reduce-overhead", "placement": "stream"},
            "compile_mode is 'reduce-overhead'; allowed with placement 'stream': 'default' or",
        ),
        (
            {"capture": "on", "method": "conadv", "placement": "ranks", "attackers": 1},
            "capture is 'on'; allowed with placement 'ranks': 'auto' or 'off', as the attack runs on other ranks",
        ),
    ],
)
def test_modes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        resolved(Config().replace(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_give_what_the_network_gives(name, micro_batch):
    """To rounding, as compiled sums have another order."""
    make, _ = CASES[name]
    torch.compiler.reset()
    states = []
    for section in (Model(), GRAPHS):
        model = mixture_batch_norm(small_cnn().double()).cuda()
        network = network_of(model, section, torch.device("cuda"))
        states.append(trained(network, model, make(), micro_batch, section).state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-6, msg=key)
