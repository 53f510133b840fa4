"""The module of mixture batch norm and what all of a model share; `conadv_lab.models.norm` converts and switches."""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv_lab.models.averages import Averages, StepStatistics
from conadv_lab.models.synchronised import synchronised

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
class Ranks:
    """The ranks that average their statistics; ``spread`` where each of them has a slice of every group."""

    group: Any
    spread: bool

    def __deepcopy__(self, _memo: object) -> None:
        return None  # a copy of a model, as for an evaluation, belongs to its own rank alone


@dataclass
class Mode:
    """What all mixture norms of one model share: which branch, which statistics, and those of an open global step.

    ``counted`` is unset while forwards are left out of the step's statistics: those that a backward makes once more, as
    activation checkpointing does, and those of a method that says so. ``branch`` None is then one that nobody knows.
    ``whole`` are the models, by identity, all of whose mixture norms were seen to share this mode.
    """

    branch: Branch | Parts | None = "main"
    statistics: Statistics | None = None
    counted: bool = True
    step: StepStatistics = field(default_factory=StepStatistics)
    rows_multiplied: bool = False
    whole: set[int] = field(default_factory=set)
    adversarial_updates: int | None = None
    ranks: Ranks | None = None


class MixtureBatchNorm(nn.Module):
    """Two batch norms with the same input shape; the model's context says which one an image goes through.

    The children ``main`` and ``adversarial`` are ordinary batch norms of the type that was converted, so
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` keeps both. Other attributes are those of ``main``. Hooks of the
    norm are those of both branches, and are called with the branch that an image goes through.
    """

    def __init__(self, norm: _BatchNorm, mode: Mode) -> None:
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
        if branch is None:
            raise ValueError(
                "activation checkpointing makes a forward again, and the shared backward of clean and altered images "
                "does not say which; allowed where a batch norm sees other rows than images: a paired method, "
                "or no checkpointing"
            )
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
        norm: Any = self.main if branch == "main" else self.adversarial
        if not (
            norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
        ):
            return self._normalised(branch, norm, x)
        norm.forward = lambda x: self._normalised(branch, norm, x)
        try:
            return norm(x)
        finally:
            del norm.forward

    def _normalised(self, branch: Branch, norm: Any, x: Tensor) -> Tensor:
        statistics = self.mode.statistics
        if statistics == "batch":
            if self.mode.ranks is not None and self.mode.ranks.spread:
                return synchronised(x, norm.weight, norm.bias, norm.eps, self.mode.ranks.group)[0]
            return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        if statistics is None and norm.training and norm.running_mean is not None:
            if self.mode.step.open or not self.mode.counted:
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
        if not self.mode.counted:  # the same bits as below
            return self._by_batch(Averages.of(branch, norm), norm, x)
        group = self._averages.get(branch)
        if group is None or not group.fits(norm):
            group = self._averages[branch] = Averages.of(branch, norm)
        self.mode.step.sees(group)
        return self._by_batch(group, norm, x)

    def _by_batch(self, group: Averages, norm: Any, x: Tensor) -> Tensor:
        """Normalise by the batch, whose statistics go into ``group``."""
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


def _twin(norm: _BatchNorm) -> _BatchNorm:
    """A copy that shares the norm's hooks: a handle removes one from both, and what one records into is no copy."""
    hooks = {id(of_one_kind): of_one_kind for of_one_kind in (getattr(norm, name) for name in HOOKS)}
    # Weights that a hook computes before each forward, as pruning does, are no leaves, which torch does not copy.
    computed = {
        id(v): v.detach().clone() for v in vars(norm).values() if isinstance(v, Tensor) and not v.is_leaf
    }
    return copy.deepcopy(norm, {**hooks, **computed})


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


def _forget_updates(module: MixtureBatchNorm, _keys: object) -> None:
    module.mode.adversarial_updates = None
