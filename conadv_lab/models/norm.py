"""Mixture batch norm: one batch norm for clean images and one for adversarial images, in any network.

Adversarial images have different activation statistics from clean ones, so each kind is normalised by its own
branch (Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020). Only the main branch is
used after training.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv_lab.mistakes import require
from conadv_lab.models.averages import Averages
from conadv_lab.models.mixture import Branch, MixtureBatchNorm, Mode, Parts, Ranks, Statistics
from conadv_lab.models.synchronised import average_over_ranks


def mixture_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm of ``model`` (1d, 2d, 3d, Sync) an adversarial branch; changes and returns it.

    Both branches start from the existing weights and running statistics. A model that is already converted, or
    has no batch norm, is returned unchanged.

    Raises:
        ValueError: no module, or a batch norm subclass with its own forward method.

    >>> net = mixture_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> sorted(name for name, _ in net.named_parameters() if name.startswith("1."))
    ['1.adversarial.bias', '1.adversarial.weight', '1.main.bias', '1.main.weight']
    """
    _require_module(model)
    mode = next((m.mode for m in model.modules() if isinstance(m, MixtureBatchNorm)), Mode())
    mode.whole.clear()
    mode.adversarial_updates = None
    return _convert(model, mode, {})


def plain_batch_norm(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` without the adversarial branch, for export and inference."""
    _require_module(model)
    plain = copy.deepcopy(model)
    if isinstance(plain, MixtureBatchNorm):
        return plain.main
    for parent in list(plain.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, MixtureBatchNorm):
                setattr(parent, name, child.main)
    return plain


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        told = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        raise ValueError(f"model is {told}; allowed: a torch.nn.Module")


def has_batch_norm(model: nn.Module) -> bool:
    """Whether ``model`` has a batch norm outside a mixture."""
    inside = {id(n) for m in model.modules() if isinstance(m, MixtureBatchNorm) for n in m.children()}
    return any(isinstance(m, _BatchNorm) and id(m) not in inside for m in model.modules())


def branch_parameters(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs of corresponding parameters of the main and the adversarial branch that are trainable in both."""
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
    """Send images through one branch, or the leading ones of a batch through the main branch.

    Statistics of a forward pass inside count for the step once it ends; those of one that raised are discarded.

    Args:
        model: a model converted by `mixture_batch_norm`; one without batch norm is left alone.
        branch: ``"main"``, ``"adversarial"``, or (clean, altered): the number of leading clean images in a batch and
            of altered ones that follow.
        statistics: None follows ``train()`` and ``eval()``; ``"running"`` and ``"batch"`` force one kind and do not
            update the running statistics.
        counted: False runs forward passes as in training but does not count their statistics, inside a step or not.

    Raises:
        ValueError: an unknown branch, or a model whose parts were converted separately.
        RowsMultiplied: by a forward pass inside, if a norm sees a different number of rows than there are images.
    """
    counts = branch if isinstance(branch, tuple) else ()
    fine = len(counts) == 2 and all(isinstance(n, int) and n >= 0 for n in counts)
    allowed = "'main', 'adversarial' or (clean, altered) numbers of images"
    require(fine or branch in ("main", "adversarial"), "branch", branch, allowed)
    mode = _mode(model)
    if mode is None:
        yield
        return
    mode.step.fold()
    mode.step.twice = False
    with _set(mode, branch=branch, statistics=statistics, counted=counted and mode.counted):
        try:
            yield
            mode.step.fold()
        except BaseException:
            mode.step.forget_seen()
            raise


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Forward passes inside run as in training, but their statistics never count, whatever `branch_of` says."""
    with _set(_mode(model), counted=False):
        yield


@contextmanager
def backward_of(model: nn.Module, branch: Branch | Parts | None) -> Iterator[None]:
    """For the backward pass of a forward pass through this branch, parts of which activation checkpointing recomputes.

    They use the same branch, and their statistics, which the step already has, are not counted twice.

    Args:
        branch: as for `branch_of`; None if the backward pass covers several forward passes, which it cannot tell apart.
    """
    with _set(_mode(model), branch=branch, counted=False):
        yield


def takes_both(model: nn.Module) -> bool:
    """Whether clean and altered images may share a forward pass: no norm is known whose rows are not images."""
    mode = _mode(model)
    return mode is None or not mode.rows_multiplied


def left_no_statistics(model: nn.Module) -> bool:
    """Whether the latest forward pass, which raised, left nothing in the step's statistics and can be repeated."""
    mode = _mode(model)
    return mode is None or not mode.step.twice


@contextmanager
def one_update(model: nn.Module, momentum: float | None = None) -> Iterator[None]:
    """Update running statistics once, on exit, with the average over all ghost batches seen inside.

    So the statistics do not depend on the order of a global batch's ghost batches nor, after `share_statistics`,
    on which rank saw which. Outside this context a mixture norm updates at every training forward pass, like an
    ordinary batch norm. After an exception the running statistics are unchanged.

    Args:
        momentum: weight of the new average; None: each norm's own.
    """
    mode = _mode(model)
    if mode is None:
        yield
        return
    require(not mode.step.open, "one_update", "nested", "one open global step per model")
    mode.step.open = True
    try:
        yield
        mode.step.commit(momentum, partial(_average, mode.ranks))
        if mode.adversarial_updates is not None and mode.step.touched("adversarial"):
            mode.adversarial_updates += 1
    except BaseException:
        with suppress(RuntimeError):  # in a capture that is broken off closing raises too, and would hide why
            mode.step.close()
        raise
    mode.step.close()


def share_statistics(model: nn.Module, group: Any, spread: bool = False) -> None:
    """Let `one_update` average over the ghost batches of all ranks of a process group; each rank must see at least one.

    Args:
        model: a model converted by `mixture_batch_norm`; its deep copies do not share.
        group: a `torch.distributed` process group; all its ranks must open and close the same global steps.
        spread: every rank has a slice of each ghost batch, and the slices are normalised as one batch: synchronised
            batch norm, on a CPU too.
    """
    mode = _mode(model)
    if mode is not None:
        mode.ranks = Ranks(group, spread)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the main branch's running statistics by their average over ``batches`` of images (B, C, H, W).

    Otherwise runs with few steps are evaluated with averages that have not converged. Keeps train or eval mode.
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
                model(images.clone())  # a forward pass may modify its input
    finally:
        for module, flag in training:
            module.training = flag


def adversarial_updates(model: nn.Module) -> int | None:
    """How often the adversarial branch's running statistics were updated; None without mixture batch norm."""
    mode = _mode(model)
    if mode is None:
        return None
    if mode.adversarial_updates is None:
        # Kept on the host, as reading the buffer would synchronise in every step.
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
            remedy = "move the rest to another module"
            if type(module).__name__ == "BatchNormAct2d":
                remedy = "call conadv_lab.models.timm_models.split_batch_norms(model) first"
            raise ValueError(
                f"the model has a {type(module).__name__}, a batch norm with its own forward method, which an "
                f"adversarial branch would lose; allowed: torch's batch norm; {remedy}"
            )
        # A norm that is used in two places stays one norm.
        return done.setdefault(id(module), MixtureBatchNorm(module, mode))
    for name, child in module._modules.items():  # named_children would skip a second use
        if child is not None:
            module._modules[name] = _convert(child, mode, done)
    return module


@contextmanager
def _set(mode: Mode | None, **values: Any) -> Iterator[None]:
    """Set attributes of the mode, and restore them on exit; nothing without a mode."""
    before = {name: getattr(mode, name) for name in values} if mode is not None else {}
    try:
        for name in before:
            setattr(mode, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(mode, name, value)


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
                f"parts of the model were converted separately, so {name!r} does not switch branches with the others; "
                "convert it as a whole: model = conadv_lab.mixture_batch_norm(model)"
            )


def _average(ranks: Ranks | None, averages: Sequence[Averages]) -> None:
    if ranks is not None and not ranks.spread:  # slices of a ghost batch already have its statistics
        average_over_ranks([(one.count, [one.step_mean, one.step_var]) for one in averages], ranks.group)


def note_updates(model: nn.Module, count: int | None) -> None:
    """Set how often the adversarial branch was updated, after its buffers were written without `one_update`."""
    mode = _mode(model)
    if mode is not None:
        mode.adversarial_updates = count
