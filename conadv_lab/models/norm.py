"""Mixture batch norm: one batch norm for clean images and one for adversarial images, in any network.

Adversarial images have other activation statistics than clean ones, so each kind is normalised by a branch
of its own (Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020). Only the main branch is
used after training.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv_lab.mistakes import require
from conadv_lab.models.averages import Averages
from conadv_lab.models.mixture import (
    Branch,
    MixtureBatchNorm,
    Mode,
    Parts,
    Ranks,
    Statistics,
)
from conadv_lab.models.synchronised import average_over_ranks


def mixture_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm of ``model`` (1d, 2d, 3d, Sync) an adversarial branch; changes and returns it.

    Both branches start from the weights and running statistics found. A model that was converted before, or
    that has no batch norm, is returned as it is.

    Raises:
        ValueError: a batch norm of a subclass that does more in its forward.

    >>> net = mixture_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> sorted(name for name, _ in net.named_parameters() if name.startswith("1."))
    ['1.adversarial.bias', '1.adversarial.weight', '1.main.bias', '1.main.weight']
    """
    mode = next((m.mode for m in model.modules() if isinstance(m, MixtureBatchNorm)), Mode())
    mode.whole.clear()
    mode.adversarial_updates = None
    return _convert(model, mode, {})


def plain_batch_norm(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` without the adversarial branch: what is exported and used for inference."""
    plain = copy.deepcopy(model)
    if isinstance(plain, MixtureBatchNorm):
        return plain.main
    for parent in list(plain.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, MixtureBatchNorm):
                setattr(parent, name, child.main)
    return plain


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a batch norm outside a mixture is left in ``model``."""
    inside = {id(n) for m in model.modules() if isinstance(m, MixtureBatchNorm) for n in m.children()}
    return any(isinstance(m, _BatchNorm) and id(m) not in inside for m in model.modules())


def branch_parameters(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Corresponding weights of the main and the adversarial branch that learn in both."""
    norms = (module for module in model.modules() if isinstance(module, MixtureBatchNorm))
    pairs = (
        pair
        for norm in norms
        for pair in zip(norm.main.parameters(), norm.adversarial.parameters(), strict=True)
    )
    return [(main, other) for main, other in pairs if main.requires_grad and other.requires_grad]


@contextmanager
def branch_of(
    model: nn.Module, branch: Branch | Parts, statistics: Statistics | None = None, counted: bool = True
) -> Iterator[None]:
    """Send images through one branch, or the leading ones of a batch through the main one.

    Statistics of a forward inside are the step's once it ends; of one that raised they are left out.

    Args:
        model: a model converted by `mixture_batch_norm`; one without batch norm is left alone.
        branch: ``"main"``, ``"adversarial"``, or (clean, altered): how many images of a batch are clean, its first
            ones, and how many follow.
        statistics: None follows ``train()`` and ``eval()``; ``"running"`` and ``"batch"`` force one kind and
            leave the running statistics as they are.
        counted: False makes forwards as in training whose statistics are not counted, in an open step or outside one.

    Raises:
        ValueError: another branch, or a model whose parts were converted apart.
        RowsMultiplied: in a forward inside, where a norm sees another number of rows than there are images.
    """
    require(
        branch in ("main", "adversarial")
        or (
            isinstance(branch, tuple)
            and len(branch) == 2
            and all(isinstance(n, int) and n >= 0 for n in branch)
        ),
        "branch",
        branch,
        "'main', 'adversarial' or (clean, altered) numbers of images",
    )
    mode = _mode(model)
    if mode is None:
        yield
        return
    before = mode.branch, mode.statistics, mode.counted
    mode.step.fold()
    mode.branch, mode.statistics, mode.step.twice = branch, statistics, False
    mode.counted = counted and mode.counted
    try:
        yield
        mode.step.fold()
    except BaseException:
        mode.step.forget_seen()
        raise
    finally:
        mode.branch, mode.statistics, mode.counted = before


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Forwards within are as in training, and their statistics are not counted, whatever `branch_of` says."""
    mode = _mode(model)
    if mode is None:
        yield
        return
    before, mode.counted = mode.counted, False
    try:
        yield
    finally:
        mode.counted = before


@contextmanager
def backward_of(model: nn.Module, branch: Branch | Parts | None) -> Iterator[None]:
    """A backward of a forward through this branch: activation checkpointing makes parts of that forward again within.

    They go through the same branch, and their statistics, which the step has already, are not counted twice.

    Args:
        branch: as of `branch_of`; None where the backward is of several forwards, which then cannot be told apart.
    """
    mode = _mode(model)
    if mode is None:
        yield
        return
    before = mode.branch, mode.counted
    mode.branch, mode.counted = branch, False
    try:
        yield
    finally:
        mode.branch, mode.counted = before


def takes_both(model: nn.Module) -> bool:
    """Whether clean and altered images may share a forward, as far as is known: no norm saw other rows than images."""
    mode = _mode(model)
    return mode is None or not mode.rows_multiplied


def left_no_statistics(model: nn.Module) -> bool:
    """Whether the latest forward, which raised, left nothing in the step's statistics and can be made again."""
    mode = _mode(model)
    return mode is None or not mode.step.twice


@contextmanager
def one_update(model: nn.Module, momentum: float | None = None) -> Iterator[None]:
    """Update running statistics once, on leaving, with the average over all groups seen inside.

    So the statistics do not depend on how a global batch is cut into the same groups, nor, after `share_statistics`,
    on which rank saw which group. Outside this context a mixture norm updates at every training forward, as an
    ordinary batch norm does. After an exception the running statistics are as they were.

    Args:
        momentum: weight of the new average; None takes each norm's own.
    """
    mode = _mode(model)
    if mode is None:
        yield
        return
    require(not mode.step.open, "one_update", "nested", "one open global step a model")
    mode.step.open = True
    try:
        yield
        mode.step.commit(momentum, partial(_average, mode.ranks))
        if mode.adversarial_updates is not None and mode.step.touched("adversarial"):
            mode.adversarial_updates += 1
    finally:
        mode.step.close()


def share_statistics(model: nn.Module, group: Any, spread: bool = False) -> None:
    """Let `one_update` average over the groups of all ranks of a process group, each of which must see one at least.

    Args:
        model: a model converted by `mixture_batch_norm`; deep copies of it share with nobody.
        group: of `torch.distributed`; every rank of it must open and leave the same global steps.
        spread: every rank has a slice of each group, and the slices are normalised as one batch: synchronised
            batch norm, on a CPU too.
    """
    mode = _mode(model)
    if mode is not None:
        mode.ranks = Ranks(group, spread)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the main branch's running statistics by their average over ``batches`` of images (B, C, H, W).

    Few-step runs otherwise are judged on averages that have not warmed up. Train or eval mode is kept.
    """
    if _mode(model) is None:
        return
    training = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    model.eval()
    for norm in norms:
        norm.training = True
    try:
        with branch_of(model, "main"), one_update(model, momentum=1.0):
            for images in batches:
                model(images.clone())  # a forward may write into what it is given
    finally:
        for module, flag in training:
            module.training = flag


def adversarial_updates(model: nn.Module) -> int | None:
    """How often the adversarial branch's running statistics were updated; None without mixture batch norm."""
    mode = _mode(model)
    if mode is None:
        return None
    if mode.adversarial_updates is None:
        # Kept as a number because reading the buffer would make the host wait for the device in every step.
        norms = (m for m in model.modules() if isinstance(m, MixtureBatchNorm))
        counters = [m.adversarial.num_batches_tracked for m in norms]
        mode.adversarial_updates = max((int(c) for c in counters if c is not None), default=0)
    return mode.adversarial_updates


def _convert(module: nn.Module, mode: Mode, done: dict[int, MixtureBatchNorm]) -> nn.Module:
    if isinstance(module, MixtureBatchNorm):
        module.mode = mode
        return module
    if isinstance(module, _BatchNorm):
        if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise ValueError(
                f"the model has a {type(module).__name__}, a batch norm with a forward of its own, which an "
                "adversarial branch would lose; allowed: torch's own, what else it does in another module"
            )
        # A norm that the model uses in two places stays one norm.
        return done.setdefault(id(module), MixtureBatchNorm(module, mode))
    for name, child in module._modules.items():  # named_children would pass over a second use
        if child is not None:
            module._modules[name] = _convert(child, mode, done)
    return module


def _mode(model: nn.Module) -> Mode | None:
    norm = next((m for m in model.modules() if isinstance(m, MixtureBatchNorm)), None)
    if norm is None:
        return None
    if id(model) not in norm.mode.whole:
        _require_one_mode(model, norm.mode)
        norm.mode.whole.add(id(model))
    return norm.mode


def _require_one_mode(model: nn.Module, mode: Mode) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MixtureBatchNorm) and module.mode is not mode:
            raise ValueError(
                f"parts of the model were converted apart, so that {name!r} does not switch branches with the others; "
                "convert it as a whole: model = conadv_lab.mixture_batch_norm(model)"
            )


def _average(ranks: Ranks | None, averages: Sequence[Averages]) -> None:
    if ranks is not None and not ranks.spread:  # slices of a group know its statistics already
        average_over_ranks([(one.count, [one.step_mean, one.step_var]) for one in averages], ranks.group)


def note_updates(model: nn.Module, count: int | None) -> None:
    """Tell how often the adversarial branch was updated, after its buffers were written to without `one_update`."""
    mode = _mode(model)
    if mode is not None:
        mode.adversarial_updates = count
