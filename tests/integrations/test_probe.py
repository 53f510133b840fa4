"""Sharpness while training: due every so many steps, at a bounded share of the time."""

import pytest
import torch
from torch import nn

import conadv_lab as cl
from conadv_lab import sharpness
from conadv_lab.integrations.probe import SharpnessProbe
from tests.conftest import small_cnn

BATCH = torch.rand(6, 2, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


class Clock:
    """Seconds that only the test and `measured` let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def probe_taking(seconds: float, share: float, clock: Clock) -> SharpnessProbe:
    class Timed(SharpnessProbe):
        def _measured(self, model):
            clock.now += seconds
            return {"sharpness_trace": 1.0}

    return Timed(nn.CrossEntropyLoss(), BATCH, ["trace"], every=10, share=share, clock=clock)


def test_the_figures_are_those_of_measure_and_the_model_stays_as_it_is():
    model = cl.mixture_batch_norm(small_cnn())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = SharpnessProbe(nn.CrossEntropyLoss(), BATCH, ["top_eigenvalue", "trace"], every=2)
    assert probe(model, 1) == {}
    figures = probe(model, 2)
    report = sharpness.measure(model, nn.CrossEntropyLoss(), BATCH, ["top_eigenvalue", "trace"])
    assert figures["sharpness_trace"] == report["trace"].value
    assert figures["sharpness_top_eigenvalue"] == report["top_eigenvalue"].value
    assert figures["sharpness_seconds"] > 0
    assert figures["sharpness_skipped"] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_its_price_is_bounded_and_what_is_left_out_is_told():
    clock, model = Clock(), small_cnn()
    probe = probe_taking(5.0, 0.1, clock)
    with pytest.warns(
        UserWarning, match="skipping a sharpness measurement: they took 5 s of 19 s of"
    ) as told:
        measured = [step for step in range(1, 401) if "sharpness_trace" in after(probe, model, step, clock)]
    assert len([one for one in told if "skipping" in str(one.message)]) == 1
    assert measured[:3] == [10, 110, 160]
    assert probe.skipped == 40 - len(measured)


def after(probe: SharpnessProbe, model: nn.Module, step: int, clock: Clock) -> dict[str, float]:
    """The probe's figures after a step of one second, its price bounded by then."""
    clock.now += 1.0
    figures = probe(model, step)
    if figures and "sharpness_trace" not in figures:
        assert figures == {"sharpness_skipped": probe.skipped}
    assert probe.spent <= 0.1 * (clock.now - probe.spent) + 5.0
    return figures


def test_a_cheap_one_is_never_left_out():
    clock, model = Clock(), small_cnn()
    probe = probe_taking(0.1, 0.05, clock)
    for step in range(1, 101):
        clock.now += 1.0
        probe(model, step)
    assert probe.skipped == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["trase"]}, "trase.*trace"),
        ({"every": 0}, "every is 0; allowed: a whole number of at least 1"),
        ({"share": 0.0}, "share is 0.0; allowed: a number above 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessProbe(nn.CrossEntropyLoss(), BATCH, **options)
