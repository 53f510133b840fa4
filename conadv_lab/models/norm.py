"""Mixture batch norm: one batch norm for clean images and one for adversarial images, in any network.

Adversarial images have other activation statistics than clean ones, so each kind is normalised by a branch
of its own (Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020). Only the main branch is
used after training.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv_lab.mistakes import require
from conadv_lab.models.averages import Averages, clear, fold
from conadv_lab.models.synchronised import average_over_ranks, synchronised

Branch = Literal["main", "adversarial"]
Statistics = Literal["batch", "running"]
Parts = tuple[int, int]
"""How many leading images of a batch are clean, and how many follow that are altered."""
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class RowsMultiplied(ValueError):
    """A norm sees more or fewer rows than there are images, so that nobody knows which of them are clean."""


@dataclass(frozen=True)
class _Ranks:
    """The ranks that average their statistics; ``spread`` where each of them has a slice of every group."""

    group: Any
    spread: bool

    def __deepcopy__(self, _memo: object) -> None:
        """A copy of a model, as for an evaluation, belongs to its own rank alone."""


@dataclass
class _Mode:
    """What all mixture norms of one model share: which branch, which statistics, and an open global step.

    ``touched`` is what the forward under way saw, ``folded`` what the step's earlier ones did; ``whole`` are the
    models, by identity, all of whose mixture norms were seen to share this mode.
    """

    branch: Branch | Parts = "main"
    statistics: Statistics | None = None
    in_step: bool = False
    rows_multiplied: bool = False
    folded_within: bool = False
    whole: set[int] = field(default_factory=set)
    touched: list[Averages] = field(default_factory=list)
    folded: dict[Averages, None] = field(default_factory=dict)
    adversarial_updates: int | None = None
    ranks: _Ranks | None = None


class MixtureBatchNorm(nn.Module):
    """Two batch norms with the same input shape; the model's context says which one an image goes through.

    The children ``main`` and ``adversarial`` are ordinary batch norms of the type that was converted, so
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` keeps both. Other attributes are those of ``main``. Hooks of the
    norm are those of both branches, and are called with the branch that an image goes through.
    """

    def __init__(self, norm: _BatchNorm, mode: _Mode) -> None:
        super().__init__()
        self.main = norm
        self.adversarial = _twin(norm)
        self.mode = mode
        self._averages = self._empty_averages()
        self.register_load_state_dict_post_hook(_forget_updates)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "main":
                raise
            return getattr(self.main, name)

    def _apply(self, fn: Any, recurse: bool = True) -> "MixtureBatchNorm":
        super()._apply(fn, recurse)
        self._averages = self._empty_averages()
        return self

    def _empty_averages(self) -> dict[str, Averages]:
        # Made here and not in a forward, which would have to be compiled once to make them and once to use them.
        norms: dict[str, Any] = {"main": self.main, "adversarial": self.adversarial}
        return {
            name: Averages.of(name, norm) for name, norm in norms.items() if norm.running_mean is not None
        }

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mode.branch
        if not isinstance(branch, tuple):
            return self._normalise(branch, x)
        clean, other = branch
        if len(x) != clean + other:
            self.mode.rows_multiplied = True
            raise RowsMultiplied(
                f"a batch norm sees {len(x)} rows of {clean + other} images, as where time or crops are folded into "
                "the batch; allowed: clean and altered images in forwards of their own"
            )
        if other == 0:
            return self._normalise("main", x)
        if clean == 0:
            return self._normalise("adversarial", x)
        # split, not slices: the backward of a split is one concatenation, of slices two zero-filled copies
        parts = x.split((clean, other))
        return torch.cat([self._normalise("main", parts[0]), self._normalise("adversarial", parts[1])])

    def _normalise(self, branch: Branch, x: Tensor) -> Tensor:
        norm = self.main if branch == "main" else self.adversarial
        if not (
            norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
        ):
            return self._normalised(branch, norm, x)
        norm.__dict__["forward"] = lambda x: self._normalised(branch, norm, x)
        try:
            return norm(x)
        finally:
            del norm.__dict__["forward"]

    def _normalised(self, branch: Branch, norm: Any, x: Tensor) -> Tensor:
        statistics = self.mode.statistics
        if statistics == "batch":
            if self.mode.ranks is not None and self.mode.ranks.spread:
                return synchronised(x, norm.weight, norm.bias, norm.eps, self.mode.ranks.group)[0]
            return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        if statistics is None and norm.training and norm.running_mean is not None:
            if self.mode.in_step:
                return self._accumulate(branch, norm, x)
            self.mode.adversarial_updates = None
            return type(norm).forward(norm, x)
        norm._check_input_dim(x)
        use_batch = norm.running_mean is None
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, use_batch, 0.0, norm.eps
        )

    def _accumulate(self, branch: Branch, norm: Any, x: Tensor) -> Tensor:
        """Normalise by the batch and add its statistics to the average over this step's groups."""
        group = self._averages.get(branch)
        if group is None or not group.fits(norm):
            group = self._averages[branch] = Averages.of(branch, norm)
        if group.waiting:
            _fold(self.mode)  # the norm is used twice in a forward, or forwards follow without `branch_of`
            self.mode.folded_within = True
        group.waiting = True
        self.mode.touched.append(group)
        # Momentum 1: the buffers take this group's statistics as they are.
        if _spans_ranks(norm):
            return _with_buffers(norm, group, x)
        norm._check_input_dim(x)
        if self.mode.ranks is not None and self.mode.ranks.spread:
            y, mean, var = synchronised(x, norm.weight, norm.bias, norm.eps, self.mode.ranks.group)
            group.mean.copy_(mean)
            group.var.copy_(var)
            return y
        return F.batch_norm(x, group.mean, group.var, norm.weight, norm.bias, True, 1.0, norm.eps)


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
    mode = next((m.mode for m in model.modules() if isinstance(m, MixtureBatchNorm)), _Mode())
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
    model: nn.Module, branch: Branch | Parts, statistics: Statistics | None = None
) -> Iterator[None]:
    """Send images through one branch, or the leading ones of a batch through the main one.

    Statistics of a forward inside that raised are left out of those of the step.

    Args:
        model: a model converted by `mixture_batch_norm`; one without batch norm is left alone.
        branch: ``"main"``, ``"adversarial"``, or (clean, altered): how many images of a batch are clean, its first
            ones, and how many follow.
        statistics: None follows ``train()`` and ``eval()``; ``"running"`` and ``"batch"`` force one kind and
            leave the running statistics as they are.

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
    before = mode.branch, mode.statistics
    _fold(mode)
    mode.branch, mode.statistics, mode.folded_within = branch, statistics, False
    try:
        yield
    except BaseException:
        for group in mode.touched:
            group.waiting = False
        mode.touched.clear()
        raise
    finally:
        mode.branch, mode.statistics = before


def takes_both(model: nn.Module) -> bool:
    """Whether clean and altered images may share a forward, as far as is known: no norm saw other rows than images."""
    mode = _mode(model)
    return mode is None or not mode.rows_multiplied


def left_no_statistics(model: nn.Module) -> bool:
    """Whether the latest forward, which raised, left nothing in the step's statistics and can be made again."""
    mode = _mode(model)
    return mode is None or not mode.folded_within


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
    require(not mode.in_step, "one_update", "nested", "one open global step a model")
    mode.in_step = True
    try:
        yield
        _commit(mode, momentum)
    finally:
        _fold(mode)
        clear(list(mode.folded))
        mode.folded.clear()
        mode.in_step = False


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
        mode.ranks = _Ranks(group, spread)


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


def _twin(norm: _BatchNorm) -> _BatchNorm:
    """A copy that shares the norm's hooks: a handle removes one from both, and what one records into is no copy."""
    hooks = {id(of_one_kind): of_one_kind for of_one_kind in (getattr(norm, name) for name in HOOKS)}
    # Weights that a hook computes before each forward, as pruning does, are no leaves, which torch does not copy.
    computed = {
        id(v): v.detach().clone() for v in vars(norm).values() if isinstance(v, Tensor) and not v.is_leaf
    }
    return copy.deepcopy(norm, {**hooks, **computed})


def _convert(module: nn.Module, mode: _Mode, done: dict[int, MixtureBatchNorm]) -> nn.Module:
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


def _mode(model: nn.Module) -> _Mode | None:
    norm = next((m for m in model.modules() if isinstance(m, MixtureBatchNorm)), None)
    if norm is None:
        return None
    if id(model) not in norm.mode.whole:
        _require_one_mode(model, norm.mode)
        norm.mode.whole.add(id(model))
    return norm.mode


def _require_one_mode(model: nn.Module, mode: _Mode) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MixtureBatchNorm) and module.mode is not mode:
            raise ValueError(
                f"parts of the model were converted apart, so that {name!r} does not switch branches with the others; "
                "convert it as a whole: model = conadv_lab.mixture_batch_norm(model)"
            )


def _fold(mode: _Mode) -> None:
    if mode.touched:
        fold(mode.touched)
        mode.folded |= dict.fromkeys(mode.touched)
        mode.touched.clear()


def _commit(mode: _Mode, momentum: float | None) -> None:
    """One exponential-average step of every touched norm; ``momentum=None`` in a norm means a plain average."""
    _fold(mode)
    if not mode.folded:
        return
    if mode.ranks is not None and not mode.ranks.spread:  # slices of a group know its statistics already
        average_over_ranks([(g.count, [g.step_mean, g.step_var]) for g in mode.folded], mode.ranks.group)
    torch._foreach_add_([group.norm.num_batches_tracked for group in mode.folded], 1)
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for group in mode.folded:
        norm = group.norm
        weight = momentum if momentum is not None else norm.momentum
        weight = 1.0 / int(norm.num_batches_tracked) if weight is None else weight
        old, new = by_weight.setdefault(weight, ([], []))
        old += [norm.running_mean, norm.running_var]
        new += [group.step_mean, group.step_var]
    with torch.no_grad():
        for weight, (old, new) in by_weight.items():
            torch._foreach_lerp_(old, new, weight)
    if mode.adversarial_updates is not None and any(g.branch == "adversarial" for g in mode.folded):
        mode.adversarial_updates += 1


def _spans_ranks(norm: _BatchNorm) -> bool:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return isinstance(norm, nn.SyncBatchNorm) and ready and torch.distributed.get_world_size() > 1


def _with_buffers(norm: Any, group: Averages, x: Tensor) -> Tensor:
    """Call a synchronised norm, its statistics going to ``group`` instead of its own buffers."""
    kept = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
    norm.running_mean, norm.running_var = group.mean, group.var
    norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
    norm.momentum = 1.0
    try:
        return type(norm).forward(norm, x)
    finally:
        norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum = kept


def forget_updates(model: nn.Module) -> None:
    """Count the adversarial branch's updates anew from its buffers: call it after writing to them directly."""
    mode = _mode(model)
    if mode is not None:
        mode.adversarial_updates = None


def _forget_updates(module: MixtureBatchNorm, _keys: object) -> None:
    module.mode.adversarial_updates = None
