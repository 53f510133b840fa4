"""What a criterion's mean divides by: examples, non-ignored labels, class weights, tokens.

Batches must be weighted by it; otherwise ignored labels and weighted classes count more in one batch than in another.
It is read from torch's losses that the criterion calls, and verified: the weighted mean over a batch's parts must
equal the batch's loss, on outputs rescaled to make the parts differ strongly.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from conadv_lab.sharpness.problem.nests import take

Criterion = Callable[[Any, Any], Tensor]
SCALES = ((4.0, 0.25), (1.0, 0.25))
"""Factors on both parts' outputs; the second pair keeps probabilities valid."""


def _of_labels(input: Tensor, target: Tensor, weight: Tensor | None, ignore: int) -> tuple[float, bool]:
    if target.is_floating_point():  # a distribution per position; class weights are not in the divisor
        classes = input.shape[1] if input.ndim > 1 else input.shape[0]
        return input.numel() / classes, weight is None
    kept = target[target != ignore]
    if weight is None:
        return float(kept.numel()), kept.numel() == target.numel()
    return float(weight.double()[kept].sum()), False


def _of_elements(input: Tensor, target: Tensor) -> float:
    return float(torch.broadcast_shapes(input.shape, target.shape).numel())


LABELLED = (F.cross_entropy, F.nll_loss)
ELEMENTWISE = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.kl_div,
    F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss,
)  # fmt: skip
_SIGNATURES = {function: inspect.signature(function) for function in (*LABELLED, *ELEMENTWISE)}


class Divisors(TorchFunctionMode):
    """Records the divisor of each torch loss called inside, and whether all its labels count equally."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[float, bool] | None] = set()
        self.labelled = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _SIGNATURES:
            self.found.add(self._of(func, args, kwargs or {}))
            self.labelled |= func in LABELLED
        return func(*args, **(kwargs or {}))

    def _of(self, func: Any, args: Any, kwargs: Any) -> tuple[float, bool] | None:
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        told = bound.arguments
        input, target = list(told.values())[:2]  # their names differ between losses
        if told.get("reduce") is not None or told.get("size_average") is not None:
            return None
        if func in LABELLED and told["reduction"] == "mean":
            return _of_labels(input, target, told["weight"], told["ignore_index"])
        if told["reduction"] == "batchmean":
            return float(input.shape[0]), True
        return (_of_elements(input, target), True) if told["reduction"] == "mean" else None

    @property
    def divisor(self) -> tuple[float, bool] | None:
        """The common divisor of all losses called, or ``None``."""
        return next(iter(self.found)) if len(self.found) == 1 else None


def _whole(divisor: float, targets: Any) -> bool:
    """Whether the divisor covers all labels: a mask may have dropped some before the loss."""
    return not isinstance(targets, Tensor) or divisor % max(targets.numel(), 1) == 0


def labels_that_count(criterion: Any, targets: Tensor) -> Tensor:
    """Mask of class labels that the criterion (by default, any torch loss) does not ignore."""
    return targets != getattr(criterion, "ignore_index", -100)


@torch.no_grad()
def _value(criterion: Criterion, output: Any, targets: Any) -> float:
    """The loss on copies, as a criterion may modify its arguments."""
    mine = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (output, targets))
    return float(criterion(*mine))


def divisor(criterion: Criterion, output: Any, targets: Any) -> float:
    """The criterion's divisor on these outputs, if it can be determined."""
    with Divisors() as seen:
        _value(criterion, output, targets)
    assert seen.divisor is not None
    return seen.divisor[0]


def _by_examples(output: Any, targets: Any) -> float:
    return float(tree_leaves(output)[0].shape[0])


Part = tuple[Any, Any]


class Mean:
    """The weights of a data set's batches, determined in the first pass over them.

    Attributes:
        weights: each batch's weight: the divisor of its loss.
        uniform: no label is ignored and no class is weighted.
        over_examples: the loss is a mean over examples that count equally in every batch.
    """

    def __init__(self, criterion: Criterion, alone: bool) -> None:
        self.criterion, self.alone = criterion, alone
        self.weights: list[float] = []
        self.uniform = self.over_examples = True
        self._kind = ""
        self._first: Part | None = None
        self._per = 1.0

    def add(
        self, seen: Divisors, output: Any, targets: Any, size: int, run: Callable[[slice], Part]
    ) -> float:
        """The weight of the next batch.

        Args:
            seen: the torch losses that the criterion called on this batch.
            run: returns the model's outputs and the targets of part of the batch.

        Raises:
            ValueError: no example of it counts, or what the mean is over cannot be determined.
        """
        index, known = len(self.weights), seen.divisor
        if known is not None and known[0] <= 0:
            raise ValueError(
                f"batch {index} has no label that counts (all are ignored or have weight 0), so its loss is "
                "undefined; leave it out"
            )
        batch = halves(output, targets)
        if index == 0:
            self._kind = self._found_out(known, batch, size, run)
            self._first = _a_part(batch, output, targets)
        elif self._kind == "examples" and not self._still_over_examples(
            batch, _a_part(batch, output, targets), size, run
        ):
            self._kind = "batch"
        if self._kind == "labels" and known is not None:
            self.uniform &= known[1] and _whole(known[0], targets)
            self.weights.append(known[0])
        else:
            self.weights.append(float(size))
        if self._kind == "batch" and (index > 0 or not self.alone):
            raise ValueError(
                f"the criterion is not a mean over examples (batch {index} is not the mean of its "
                "parts), so batches cannot be weighted; allowed: all data as one batch, or one of torch's losses "
                "with reduction='mean', whose ignored labels and class weights are handled"
            )
        self.uniform &= self._kind != "batch"
        self._per = self._per if index else self.weights[0] / size
        self.over_examples &= self.uniform and abs(self.weights[-1] / size / self._per - 1) < 1e-9
        return self.weights[-1]

    @property
    def of_parts(self) -> bool:
        """Whether a batch's loss is a mean of its parts' losses."""
        return self._kind != "batch"

    def of(self, output: Any, targets: Any, size: int) -> float:
        """The weight of part of a batch.

        Raises:
            ValueError: the loss of a batch is not a mean of its parts' losses.
        """
        if self._kind == "batch":
            raise ValueError(
                "the criterion couples the examples of a batch, or is not a mean over examples, "
                "so the batch cannot be split into groups"
            )
        return divisor(self.criterion, output, targets) if self._kind == "labels" else float(size)

    def require_alike(self, who: str, over_examples: bool = True) -> None:
        """Reject what is defined only if each example (or label) counts equally.

        Raises:
            ValueError: names ``who`` needs it.
        """
        if not (self.over_examples if over_examples else self.uniform):
            raise ValueError(
                f"{who} needs a loss in which all examples count equally; this one ignores or weights labels, has more "
                "of them in some examples, or couples the examples"
            )

    def _found_out(
        self,
        known: Any,
        batch: list[Part] | None,
        size: int,
        run: Callable[[slice], Part],
    ) -> str:
        if known is not None and self._agrees(batch, size, run, self._divisor) is not False:
            return "labels"
        return "examples" if self._agrees(batch, size, run, _by_examples) else "batch"

    def _still_over_examples(
        self, batch: list[Part] | None, part: Part | None, size: int, run: Callable[[slice], Part]
    ) -> bool:
        if not self._agrees(batch, size, run, _by_examples):
            return False
        if part is None or self._first is None:
            return True
        try:
            return not parts_differ(self.criterion, [self._first, part], _by_examples)
        except Exception:  # for example of different lengths, so that they cannot be joined
            return True

    def _divisor(self, output: Any, targets: Any) -> float:
        return divisor(self.criterion, output, targets)

    def _agrees(
        self,
        batch: list[Part] | None,
        size: int,
        run: Callable[[slice], Part],
        weigh: Callable[[Any, Any], float],
    ) -> bool | None:
        """Whether a batch's loss is the weighted mean of its parts'; ``None`` if it cannot be determined."""
        if size < 2:
            return True
        try:
            if batch is None:
                cut = (size + 2) // 3
                return not parts_differ_as_they_are(
                    self.criterion, run(slice(0, size)), [run(slice(0, cut)), run(slice(cut, size))], weigh
                )
            return not parts_differ(self.criterion, batch, weigh)
        except Exception:  # a custom criterion on half a batch
            return None


@torch.no_grad()
def parts_differ(criterion: Criterion, parts: Sequence[Part], weigh: Callable[[Any, Any], float]) -> bool:
    """Whether the joint loss of two parts differs from the weighted mean of their losses.

    Args:
        parts: outputs and targets of two parts of a batch, or of two batches.
        weigh: gives a part's weight.

    Raises:
        Exception: whatever the criterion raises on parts.
    """
    failure: Exception | None = None
    for scales in SCALES:
        moved = [(_scaled(output, s), targets) for (output, targets), s in zip(parts, scales, strict=True)]
        try:
            together = tree_map(lambda *tensors: torch.cat(tensors), *moved)
            return parts_differ_as_they_are(criterion, together, moved, weigh)
        except Exception as error:
            failure = error
    assert failure is not None
    raise failure


@torch.no_grad()
def parts_differ_as_they_are(
    criterion: Criterion, together: Part, parts: Sequence[Part], weigh: Callable[[Any, Any], float]
) -> bool:
    """The same, without rescaling the outputs."""
    losses = [_value(criterion, *part) for part in parts]
    counted = [(w, value) for w, value in zip([weigh(*part) for part in parts], losses, strict=True) if w]
    whole, mean = (
        _value(criterion, *together),
        sum(w * value for w, value in counted) / sum(w for w, _ in counted),
    )
    if not math.isfinite(whole + mean):
        raise ValueError("a loss that is not finite")
    eps = max(torch.finfo(t.dtype).eps for t in tree_leaves(parts) if _is_real(t))
    return abs(whole - mean) > eps**0.5 * max(abs(whole), *(abs(value) for _, value in counted))


def _is_real(data: Any) -> bool:
    return isinstance(data, Tensor) and data.is_floating_point()


def _scaled(output: Any, scale: float) -> Any:
    def one(tensor: Any) -> Any:
        if not _is_real(tensor):
            return tensor
        places = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
        pattern = (1.7 * places + 0.5).cos().to(tensor.dtype)
        base = tensor if bool(tensor.any()) else pattern  # a head initialised to zero
        return base * scale * (1 + 0.1 * pattern) / 1.1

    return tree_map(one, output)


def _a_part(batch: list[Part] | None, output: Any, targets: Any) -> Part | None:
    """A part of a batch to combine with another batch's: the first of two, or a single example."""
    tensors = [t for t in tree_leaves((output, targets)) if isinstance(t, Tensor)]
    alone = all(t.ndim and t.shape[0] == 1 for t in tensors)
    return batch[0] if batch else (output, targets) if alone else None


def halves(output: Any, targets: Any) -> list[Part] | None:
    """A batch's outputs and targets in two unequal parts; ``None`` if they have no common first axis."""
    tensors = [t for t in tree_leaves((output, targets)) if isinstance(t, Tensor)]
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors}
    size = min(sizes)
    if len(sizes) > 1 or size < 2:
        return None
    cut = (size + 2) // 3
    return [(take(output, part), take(targets, part)) for part in (slice(0, cut), slice(cut, size))]
