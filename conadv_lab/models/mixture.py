"""The mixture batch norm module and the state that a model's norms share; `conadv_lab.models.norm` converts models."""

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
"""(clean, altered): how many leading images of a batch are clean, and how many altered ones follow."""
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
    """A norm sees more or fewer rows than there are images, so it is unknown which rows are clean."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that average their statistics; ``spread``: each has a slice of every ghost batch."""

    group: Any
    spread: bool

    def __deepcopy__(self, _memo: object) -> None:
        return None  # a copy of a model, as for evaluation, shares nothing with other ranks


@dataclass
class Mode:
    """State shared by all mixture norms of a model: the branch, which statistics to use, and those of an open step.

    ``counted`` is unset while forward passes do not count towards the step's statistics: recomputation by activation
    checkpointing, and passes that a method excludes. ``branch`` is then None if unknown. ``whole``: models, by
    identity, all of whose mixture norms are known to share this mode.
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
    """Two batch norms with the same input shape; the model's context selects the one for each image.

    The children ``main`` and ``adversarial`` are ordinary batch norms of the converted type, so
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` keeps both. Other attributes come from ``main``. Both branches
    have the original norm's hooks, which are called with the branch in use.
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
        # Created here, since a forward pass that creates them would have to be compiled twice.
        norms: dict[str, Any] = {"main": self.main, "adversarial": self.adversarial}
        return {
            name: Averages.of(name, norm) for name, norm in norms.items() if norm.running_mean is not None
        }

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mode.branch
        if branch is None:
            raise ValueError(
                "activation checkpointing recomputes a forward pass, but the joint backward pass of clean and altered "
                "images does not say which one; allowed if a batch norm's rows are not images: a paired method, "
                "or no checkpointing"
            )
        if not isinstance(branch, tuple):
            return self._normalise(branch, x)
        clean, other = branch
        if len(x) != clean + other:
            self.mode.rows_multiplied = True
            raise RowsMultiplied(
                f"a batch norm sees {len(x)} rows for {clean + other} images, as when time or crops are folded into "
                "the batch; allowed: separate forward passes for clean and altered images"
            )
        if other == 0:
            return self._normalise("main", x)
        if clean == 0:
            return self._normalise("adversarial", x)
        # split instead of slices: its backward pass is one concatenation, that of slices two zero-filled copies
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
        """Normalise by the batch and add its statistics to the step's average."""
        if not self.mode.counted:  # the same bits as below
            return self._by_batch(Averages.of(branch, norm), norm, x)
        group = self._averages.get(branch)
        if group is None or not group.fits(norm):
            group = self._averages[branch] = Averages.of(branch, norm)
        self.mode.step.sees(group)
        return self._by_batch(group, norm, x)

    def _by_batch(self, group: Averages, norm: Any, x: Tensor) -> Tensor:
        """Normalise by the batch and store its statistics in ``group``."""
        # Momentum 1: the buffers become exactly this ghost batch's statistics.
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
    """A copy that shares the norm's hooks: a handle removes a hook from both, and both record into the same objects."""
    hooks = {id(of_one_kind): of_one_kind for of_one_kind in (getattr(norm, name) for name in HOOKS)}
    # Weights that a hook computes before each forward pass, as in pruning, are not leaves and cannot be deep-copied.
    computed = {
        id(v): v.detach().clone() for v in vars(norm).values() if isinstance(v, Tensor) and not v.is_leaf
    }
    return copy.deepcopy(norm, {**hooks, **computed})


def _spans_ranks(norm: _BatchNorm) -> bool:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return isinstance(norm, nn.SyncBatchNorm) and ready and torch.distributed.get_world_size() > 1


def _with_buffers(norm: Any, group: Averages, x: Tensor) -> Tensor:
    """Call a synchronised norm, with its statistics stored in ``group`` instead of its own buffers."""
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
