"""Mixture batch norm against ordinary batch norms and written-out averages."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from conadv_lab.models.norm import (
    MixtureBatchNorm,
    adversarial_updates,
    branch_of,
    has_batch_norm,
    mixture_batch_norm,
    one_update,
    plain_batch_norm,
    recalibrate,
)
from tests.conftest import small_cnn


def images(count: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread(model: nn.Module) -> nn.Module:
    """Make the two branches differ in weights and statistics."""
    draw = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, MixtureBatchNorm):
            for value in [*module.adversarial.parameters(), module.adversarial.running_mean]:
                value.data.add_(torch.randn(value.shape, generator=draw, dtype=value.dtype) * 0.3)
    return model


@pytest.mark.parametrize("split", [0, 1, 5, 12])
@pytest.mark.parametrize("training", [True, False])
def test_a_mixed_forward_equals_separate_ones(split, training):
    model = spread(mixture_batch_norm(small_cnn().double())).train(training)
    x, target = images(12), torch.arange(12) % 4
    mixed, separate = copy.deepcopy(model), copy.deepcopy(model)
    with branch_of(mixed, (split, 12 - split)), one_update(mixed):
        outputs = mixed(x)
        nn.functional.cross_entropy(outputs, target, reduction="sum").backward()
    parts = []
    with one_update(separate):
        for branch, part in (("main", slice(0, split)), ("adversarial", slice(split, 12))):
            if len(x[part]):
                with branch_of(separate, branch):
                    part_outputs = separate(x[part])
                nn.functional.cross_entropy(part_outputs, target[part], reduction="sum").backward()
                parts.append(part_outputs)
    assert torch.allclose(outputs, torch.cat(parts), rtol=0, atol=1e-12)
    for one, two in zip(mixed.parameters(), separate.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=0, atol=1e-12)
    for one, two in zip(mixed.buffers(), separate.buffers(), strict=True):
        assert torch.allclose(one.double(), two.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d(5), (8, 5)), (nn.BatchNorm2d(5), (8, 5, 3, 3)), (nn.BatchNorm3d(5), (8, 5, 2, 2, 2)),
     (nn.SyncBatchNorm(5), (8, 5, 3, 3)), (nn.BatchNorm2d(5, affine=False), (8, 5, 3, 3)),
     (nn.BatchNorm2d(5, momentum=None), (8, 5, 3, 3)),
     (nn.BatchNorm2d(5, track_running_stats=False), (8, 5, 3, 3))],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_each_branch_is_the_norm_that_was_converted(norm, shape):
    """Two steps of training and an evaluation through each branch equal two plain norms that see its images."""
    plain = {"main": copy.deepcopy(norm), "adversarial": copy.deepcopy(norm)}
    model = mixture_batch_norm(nn.Sequential(copy.deepcopy(norm)))
    assert isinstance(model[0], MixtureBatchNorm)
    draw = torch.Generator().manual_seed(0)
    for training in (True, True, False):
        for branch, reference in plain.items():
            x = torch.randn(shape, generator=draw) * 2 + 1
            reference.train(training)
            model.train(training)
            with branch_of(model, branch), one_update(model):
                got = model(x)
            assert torch.allclose(got, reference(x), atol=1e-6)
    for branch, reference in plain.items():
        state = getattr(model[0], branch).state_dict()
        assert state.keys() == reference.state_dict().keys()
        for name, value in reference.state_dict().items():
            assert torch.allclose(state[name].float(), value.float(), atol=1e-6), (branch, name)


def test_statistics_move_once_a_step_by_the_average_over_groups():
    model = mixture_batch_norm(nn.Sequential(nn.BatchNorm2d(2))).double()
    x = images(12)
    with one_update(model):
        for group in x.split(4):
            model(group)
    means = torch.stack([g.mean((0, 2, 3)) for g in x.split(4)]).mean(0)
    variances = torch.stack([g.var((0, 2, 3)) for g in x.split(4)]).mean(0)
    main = model[0].main
    assert torch.allclose(main.running_mean, 0.1 * means, atol=1e-12)
    assert torch.allclose(main.running_var, 0.9 + 0.1 * variances, atol=1e-12)
    assert main.num_batches_tracked == 1
    assert model[0].adversarial.num_batches_tracked == 0


def test_order_of_groups_does_not_matter():
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        model = mixture_batch_norm(nn.Sequential(nn.BatchNorm2d(2))).double()
        groups = images(12).split(4)
        with one_update(model):
            for i in order:
                model(groups[i])
        results.append(model[0].main.running_var)
    assert torch.allclose(*results, atol=1e-14)


def test_an_exception_leaves_statistics_as_they_were():
    model = mixture_batch_norm(small_cnn().double())
    before = copy.deepcopy(model.state_dict())

    def failing_step():
        with one_update(model), branch_of(model, "adversarial"):
            model(images(4))
            raise RuntimeError("in the middle of a step")

    with pytest.raises(RuntimeError, match="middle"):
        failing_step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with one_update(model):
        model(images(4))
    fresh = mixture_batch_norm(small_cnn().double())
    with one_update(fresh):
        fresh(images(4))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_export_is_the_plain_model():
    original = small_cnn()
    model = spread(mixture_batch_norm(copy.deepcopy(original)))
    plain = plain_batch_norm(model)
    assert plain.state_dict().keys() == original.state_dict().keys()
    assert not any(isinstance(module, MixtureBatchNorm) for module in plain.modules())
    x = images(5, dtype=torch.float32)
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert isinstance(plain_batch_norm(mixture_batch_norm(nn.BatchNorm1d(3))), nn.BatchNorm1d)


def test_sync_conversion_keeps_both_branches():
    model = spread(mixture_batch_norm(small_cnn()))
    before = copy.deepcopy(model.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = [module for module in synced.modules() if isinstance(module, MixtureBatchNorm)]
    assert len(norms) == 2
    assert all(isinstance(n, nn.SyncBatchNorm) for norm in norms for n in (norm.main, norm.adversarial))
    assert all(torch.equal(value, before[name]) for name, value in synced.state_dict().items())


def test_a_norm_in_two_places_stays_one_and_conversion_is_idempotent():
    shared = nn.BatchNorm2d(2)
    model = mixture_batch_norm(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert mixture_batch_norm(model)[0] is model[0]
    assert not has_batch_norm(model)
    assert has_batch_norm(nn.Sequential(model, nn.BatchNorm2d(2)))


def test_a_copy_has_a_branch_of_its_own():
    model = mixture_batch_norm(small_cnn())
    twin = copy.deepcopy(model)
    with branch_of(model, "adversarial"):
        assert model[1].mode.branch == "adversarial"
        assert twin[1].mode.branch == "main"
    assert twin[1].mode is twin[4].mode


def test_updates_are_counted_and_survive_a_state_dict():
    model = mixture_batch_norm(small_cnn())
    assert adversarial_updates(model) == 0
    for _ in range(3):
        with one_update(model), branch_of(model, "adversarial"):
            model(images(4, dtype=torch.float32))
    assert adversarial_updates(model) == 3
    other = mixture_batch_norm(small_cnn())
    assert adversarial_updates(other) == 0
    other.load_state_dict(model.state_dict())
    assert adversarial_updates(other) == 3
    assert adversarial_updates(nn.Linear(2, 2)) is None


def test_recalibration_is_the_average_over_batches_and_keeps_the_mode():
    model = mixture_batch_norm(nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5))).double()
    model.eval()
    groups = images(12).split(6)
    recalibrate(model, groups)
    assert not model.training
    assert not model[0].main.training
    expected = torch.stack([g.mean((0, 2, 3)) for g in groups]).mean(0)
    assert torch.allclose(model[0].main.running_mean, expected, atol=1e-12)
    assert torch.equal(model[0].adversarial.running_mean, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("convert", [mixture_batch_norm, plain_batch_norm])
def test_what_is_no_module_is_refused(convert):
    with pytest.raises(ValueError, match=r"model is of type OrderedDict; allowed: a torch\.nn\.Module"):
        convert(small_cnn().state_dict())
    with pytest.raises(ValueError, match=r"model is the class BatchNorm2d; allowed: a torch\.nn\.Module"):
        convert(nn.BatchNorm2d)


@pytest.mark.parametrize("branch", ["adverserial", (3, -1), 3, None])
def test_an_unknown_branch_is_refused(branch):
    with pytest.raises(ValueError, match="branch is"), branch_of(mixture_batch_norm(small_cnn()), branch):
        pass


def test_a_step_that_went_wrong_leaves_no_nan_behind():
    model = mixture_batch_norm(nn.Sequential(nn.BatchNorm2d(2))).double()
    good = copy.deepcopy(model.state_dict())
    with one_update(model):
        model(images(4) * float("nan"))
    assert model[0].main.running_mean.isnan().all()
    model.load_state_dict(good)
    with one_update(model):
        model(images(4))
    assert torch.allclose(model[0].main.running_mean, 0.1 * images(4).mean((0, 2, 3)), atol=1e-12)


def test_a_norm_over_ranks_gives_its_statistics_to_the_step(monkeypatch):
    """The path of several ranks, with one: the synchronised norm's own forward, the step's buffers."""
    monkeypatch.setattr("conadv_lab.models.mixture._spans_ranks", lambda norm: True)
    model = mixture_batch_norm(nn.Sequential(nn.SyncBatchNorm(2))).double()
    x = images(12)
    with one_update(model):
        for group in x.split(4):
            model(group)
    means = torch.stack([g.mean((0, 2, 3)) for g in x.split(4)]).mean(0)
    assert torch.allclose(model[0].main.running_mean, 0.1 * means, atol=1e-12)
    assert model[0].main.num_batches_tracked == 1
    assert model[0].main.momentum == 0.1


def test_a_norm_that_does_more_than_norm_is_refused():
    class NormAndActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match="a NormAndActivation, a batch norm with its own forward method"):
        mixture_batch_norm(nn.Sequential(nn.Conv2d(1, 2, 3), NormAndActivation(2)))


def test_updates_are_counted_where_the_first_norm_tracks_none():
    """After loading, as where a run is resumed."""
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    model, loaded = mixture_batch_norm(model), mixture_batch_norm(copy.deepcopy(model))
    for _ in range(3):
        with one_update(model), branch_of(model, "adversarial"):
            model(torch.rand(4, 3))
    loaded.load_state_dict(model.state_dict())
    assert adversarial_updates(loaded) == adversarial_updates(model) == 3


def test_parts_that_were_converted_apart_are_refused_and_mended_by_converting_the_whole():
    """Each part has a mode of its own: the second one's adversarial images would move its main statistics."""
    first, second = (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    model = nn.Sequential(mixture_batch_norm(first), mixture_batch_norm(second))
    for context in (branch_of(model, "adversarial"), one_update(model)):
        with pytest.raises(ValueError, match=r"converted separately, so '1\.1' does not switch"), context:
            pass
    mixture_batch_norm(model)
    with one_update(model), branch_of(model, "adversarial"):
        model(torch.rand(4, 2, 3, 3))
    for part in model:
        assert part[1].main.num_batches_tracked == 0
        assert part[1].adversarial.num_batches_tracked == 1


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def __call__(self, module, inputs, output) -> None:
        self.seen.append((module, inputs[0].detach(), output.detach()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_norm_fire_with_the_branch_that_the_images_go_through(when):
    norm, recorder = nn.BatchNorm2d(2), Recorder()
    handles = [norm.register_forward_hook(recorder)] if when == "before" else []
    model = mixture_batch_norm(nn.Sequential(norm))
    handles = handles or [norm.register_forward_hook(recorder)]
    x = images(6, dtype=torch.float32)
    with one_update(model), branch_of(model, (4, 2)):
        y = model(x)
    with branch_of(model, "adversarial", "running"):
        z = model(x)
    main, adversarial = model[0].main, model[0].adversarial
    expected = [(main, x[:4], y[:4]), (adversarial, x[4:], y[4:]), (adversarial, x, z)]
    assert len(recorder.seen) == 3
    for (module, seen_x, seen_y), (branch, branch_x, branch_y) in zip(recorder.seen, expected, strict=True):
        assert module is branch
        assert torch.equal(seen_x, branch_x)
        assert torch.equal(seen_y, branch_y)
    handles[0].remove()
    model(x)
    assert len(recorder.seen) == 3


def test_backward_hooks_and_hooks_that_compute_weights_fire_too():
    """Pruning makes the weight before each forward, from a parameter that would else have no gradient."""
    norm, gradients = nn.BatchNorm2d(2), []
    prune.random_unstructured(norm, "weight", amount=1)
    norm.register_full_backward_hook(lambda module, before, after: gradients.append(after[0]))
    model = mixture_batch_norm(nn.Sequential(norm))
    with torch.no_grad():
        for branch in (model[0].main, model[0].adversarial):
            branch.weight_orig.fill_(3.0)
    with one_update(model), branch_of(model, (4, 2)):
        model(images(6, dtype=torch.float32).requires_grad_()).square().sum().backward()
    for branch in (model[0].main, model[0].adversarial):
        assert torch.equal(branch.weight, 3.0 * branch.weight_mask)
        assert (branch.weight_orig.grad != 0).tolist() == branch.weight_mask.bool().tolist()
    assert [len(gradient) for gradient in gradients] == [2, 4]
