"""What is measured: a model, a loss and batches as a function of one flat vector; the model is untouched."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from conadv_lab.mistakes import require, unknown
from conadv_lab.sharpness.checks import (
    check_labels,
    check_loss,
    check_mean,
    check_shape,
    chosen_names,
    reusable,
)
from conadv_lab.sharpness.classes import classes_of
from conadv_lab.sharpness.effects import WAYS, bypassed, hidden, listed, reentrant
from conadv_lab.sharpness.judging import GradientWatch, WholeOutput, alongside, takes_whole
from conadv_lab.sharpness.means import Divisors, Mean
from conadv_lab.sharpness.nests import (
    copied,
    first_tensor,
    hash_into,
    logits,
    pair,
    real_parts,
    take,
    to_device,
)
from conadv_lab.sharpness.precision import AutocastWatch, arithmetic, autocast_around, roundoff, under
from conadv_lab.sharpness.sameness import Passes
from conadv_lab.sharpness.traceless import untouched
from conadv_lab.sharpness.wrappers import require_whole, unwrapped

Criterion = Callable[[Tensor, Any], Tensor]
Batch = tuple[Any, Any]

BN_MODES = ("eval", "train")


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor where a gradient is asked of it already, or cannot be, else a leaf of the same numbers."""
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return tensor if tensor.requires_grad or not differentiable else tensor.detach().requires_grad_()


def _cpu(numbers: float | Sequence[float]) -> Tensor:
    """Numbers of the host in float64, whatever the default device is."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


class Problem:
    """A loss over a data set as a function of the chosen parameters, laid end to end in one vector.

    The weights are copied when the problem is made: it is a snapshot, whatever happens to the model later.

    Args:
        model: any module. Its first output tensor (or ``.logits``) goes to the criterion.
        criterion: ``criterion(output, targets)``, a scalar that is the **mean** over the batch's examples, or
            over labels with some ignored or weighted, if a loss of torch does that: batches are weighed by
            what it divides by. Any other mean needs all data as one batch.
        batches: ``(inputs, targets)`` pairs that can be gone through many times: a list or a ``DataLoader``.
            One pair is one batch; a generator is read into a list. Inputs may be a tensor, a tuple
            (``model(*inputs)``) or a mapping (``model(**inputs)``). A batch may also be one mapping with
            ``labels`` in it. The first axis counts examples.
        params: names of parameters or of modules (all of the module's parameters), or ``None`` for every
            parameter that requires a gradient and has an effect on the loss.
        bn: ``"eval"`` uses batch norm's running statistics, ``"train"`` each batch's own. Other layers, such
            as dropout, are always in evaluation mode.
        dtype: computes in this type; ``None`` in the model's own. Sums over batches are at least float32.
        all_reduce: each rank of ``torch.distributed``'s default group holds a share of the data.
        seed: of anything random inside the data loader.

    Raises:
        ValueError: no batch, no parameter, unknown name, labels out of range, NaN weights, a loss that is not
            finite or not a mean, a named parameter without effect.

    >>> model = nn.Linear(3, 2)
    >>> problem = Problem(model, nn.functional.cross_entropy, (torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))
    >>> problem.size, problem.examples
    (8, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        batches: Iterable[Batch] | Batch,
        *,
        params: Sequence[str] | None = None,
        bn: str = "eval",
        dtype: torch.dtype | None = None,
        all_reduce: bool = False,
        seed: int = 0,
    ) -> None:
        if bn not in BN_MODES:
            raise unknown("bn", bn, BN_MODES)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "torch.inference_mode is on, under which there are no gradients; measure outside of it"
            )
        model = unwrapped(model)
        require_whole(model)
        self.model, self.criterion, self.bn, self.seed = model, criterion, bn, seed
        self.all_reduce = all_reduce
        self.weights_of_batches: list[float] | None = None
        self.batches = reusable(batches)
        self._passes: Iterable[Batch] = Passes(self.batches)
        tensors = dict(model.named_parameters())
        if not tensors:
            raise ValueError(f"the model {type(model).__name__} has no parameters; nothing can be measured")
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"parameter {name!r} holds NaN or infinity; allowed: finite weights")
        self.compute_dtype = dtype
        self.complex_names = frozenset(name for name, t in tensors.items() if t.is_complex())
        parts = {name: real_parts(t.detach()) for name, t in tensors.items()}
        sample = next((t for t in parts.values() if t.is_floating_point()), None)
        require(sample is not None, "parameters", list(tensors), "floating-point tensors")
        assert sample is not None
        self.device = sample.device
        self._autocast_around = autocast_around(self.device)
        self.precision = dtype or sample.dtype
        self.dtype = torch.float64 if self.precision == torch.float64 else torch.float32
        self._all = {name: to_device(t.clone(), t.device, dtype) for name, t in parts.items()}
        self.differentiates = False
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.names = chosen_names(model, tensors, params)
        self._measure_once(named=params is not None)

    # ------------------------------------------------------------------ the vector

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the chosen parameters, in the order of ``names``."""
        return [self._all[name].shape for name in self.names]

    @property
    def size(self) -> int:
        """The length of the vector: how many numbers the chosen parameters hold."""
        return sum(shape.numel() for shape in self.shapes)

    def weights(self) -> Tensor:
        """The chosen parameters as one new vector of shape ``(size,)``."""
        return torch.cat([self._all[name].reshape(-1).to(self.dtype) for name in self.names])

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector of shape ``(size,)`` cut and shaped like the chosen parameters, in the computing type."""
        parts, start = [], 0
        for name in self.names:
            tensor = self._all[name]
            part = vector[start : start + tensor.numel()].view(tensor.shape).to(tensor.dtype)
            # A complex view must not begin at an odd place.
            parts.append(part.clone() if name in self.complex_names else part)
            start += tensor.numel()
        return parts

    def slices(self) -> dict[str, slice]:
        """Where each chosen parameter lies in the vector."""
        result, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            result[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return result

    def leaves(self) -> list[Tensor]:
        """The chosen parameters as leaves of a new graph; they share the snapshot's memory."""
        return [self._all[name].detach().requires_grad_() for name in self.names]

    def restricted(self, names: Sequence[str]) -> "Problem":
        """The same problem as a function of some of its parameters, without going through the data again."""
        part = copy.copy(self)
        slices = self.slices()
        part.names = tuple(name for name in self.names if name in set(names))
        part.gradient = torch.cat([self.gradient[slices[name]] for name in part.names])
        return part

    def with_criterion(self, criterion: Criterion) -> "Problem":
        """The same problem judged by another criterion."""
        other = copy.copy(self)
        other.criterion = criterion
        return other

    def use(self, batches: list[Batch]) -> None:
        """Take these few batches, on this rank alone, in place of all the data."""
        self.all_reduce, self.weights_of_batches = False, None
        self.batches = self._passes = batches
        self.batch_sizes = tuple(first_tensor(inputs).shape[0] for inputs, _ in batches)
        self.examples = sum(self.batch_sizes)

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in this type from now on, autocast aside."""
        self.compute_dtype = self.precision = self.dtype = dtype
        self._all = {name: to_device(t, t.device, dtype) for name, t in self._all.items()}

    def state_of(self, module: str) -> dict[str, Tensor]:
        """The snapshot's parameters and buffers of one module, by their names in it."""
        state, start = self._state() | self.buffers, module + "."
        return {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}

    @property
    def arithmetic(self) -> str:
        """The type in which the model runs, autocast included, as reports call it."""
        return arithmetic(self.precision, self.autocast, self.device)

    @property
    def roundoff(self) -> float:
        """The relative spacing of the coarsest numbers that take part."""
        return roundoff(self.precision, self.autocast, self.device)

    def groups(self, m: int | None = None) -> Iterator[tuple["Problem", float]]:
        """The data in disjoint groups of at most ``m`` (``None``: the batches as given), each with its share.

        A group is a problem of its own, on its own rank; a batch that ``m`` does not divide leaves a smaller one.
        """
        with self.untouched():
            for inputs, targets, share in self.data():
                size = first_tensor(inputs).shape[0]
                for start in range(0, size, m or size):
                    part = slice(start, min(start + (m or size), size))
                    of_part = self.share_of(inputs, targets, part, share)
                    if of_part > 0:
                        group = copy.copy(self)
                        group.use([(take(inputs, part), take(targets, part))])
                        yield group, of_part

    @property
    def whole(self) -> bool:
        """Whether the criterion takes all that the model returns."""
        return isinstance(self.criterion, WholeOutput)

    def require_one_output(self, what: str, rows: bool = False) -> None:
        """Refuse what needs logits, example by example if ``rows``.

        Raises:
            ValueError: the criterion takes the model's whole output, or the outputs' first axis is another.
        """
        if self.whole:
            raise ValueError(
                f"{what} needs one tensor of outputs, but the criterion takes all that the model returns"
            )
        if rows and not self.rows:
            raise ValueError(f"{what} needs outputs whose first axis counts the examples")

    def share_of(self, inputs: Any, targets: Any, part: slice, share: float) -> float:
        """The share of a part of a batch, which has this share; 0 if none of its labels counts."""
        size, count = first_tensor(inputs).shape[0], part.stop - part.start
        if count == size or self.mean.over_examples:
            return share * count / size
        inputs, targets = take(inputs, part), take(targets, part)
        with torch.no_grad():
            return self.mean.of(self.outputs(self.leaves(), inputs), targets, count) / self.counted

    def group_mean(self, samples: Sequence[float], shares: Sequence[float]) -> tuple[float, float | None]:
        """The mean over groups of all ranks, weighted by share, and its standard error (``None`` for one group)."""
        x = _cpu(samples)
        weighted = float((x * _cpu(shares)).sum())
        sums = self.reduced(_cpu([weighted, float(len(x)), float(x.sum())])).cpu()
        count, centre = float(sums[1]), float(sums[2] / sums[1])
        spread = self.reduced((x - centre).square().sum())
        error = (float(spread) / (count - 1) / count) ** 0.5 if count > 1 else None
        return float(sums[0]), error

    # ------------------------------------------------------------------ the function

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The context in which batches are read and the model is run; see :func:`untouched`.

        Autocast is as it was around the problem's making.
        """
        with (
            untouched(self.model, self.batches, self.bn, self.seed),
            under(self._autocast_around, self.device),
        ):
            yield

    def data(self) -> Iterator[tuple[Any, Any, float]]:
        """Each batch on the device, with its share: of what the loss divides by, such as all examples."""
        for index, batch in enumerate(self._passes):
            inputs, targets = pair(batch)
            inputs = to_device(inputs, self.device, self.compute_dtype)
            targets = copied(to_device(targets, self.device, self.compute_dtype))
            if self.weights_of_batches is None:
                yield inputs, targets, first_tensor(inputs).shape[0] / self.examples
            else:
                yield inputs, targets, self.weights_of_batches[index] / self.counted

    def outputs(self, parameters: Sequence[Tensor], inputs: Any, raw_alone: bool = False) -> Any:
        """The model's outputs at these parameters; buffers are copies, so running statistics stay.

        One tensor: the output, its ``logits``, its first part, or all parts where the criterion takes them all.
        With ``raw_alone`` what the model returned.
        """
        wanted = torch.is_grad_enabled()
        state = self._state(zip(self.names, parameters, strict=True))
        if self.differentiates:  # perhaps in its weights, whether or not we do
            state = {k: _leaf(t) for k, t in state.items()}
        for name, buffer in self.buffers.items():
            state[name] = to_device(buffer.clone(), buffer.device, self.compute_dtype)
        inputs = copied(inputs)  # a forward pass may write into its inputs, which are the caller's
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        else:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
        with (
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
            torch.set_grad_enabled(wanted or self.differentiates),
        ):
            raw = torch.func.functional_call(self.model, state, args, kwargs)
            if raw_alone:
                return raw
            output = self.criterion.pack(raw) if isinstance(self.criterion, WholeOutput) else logits(raw)
        return output if wanted else output.detach()

    def _state(self, chosen: Iterable[tuple[str, Tensor]] = ()) -> dict[str, Tensor]:
        """All parameters by name, these ones chosen, as the model has them: complex ones of their two parts."""
        state = self._all | dict(chosen)
        return state | {name: torch.view_as_complex(state[name]) for name in self.complex_names}

    def loss(self, parameters: Sequence[Tensor], inputs: Any, targets: Any) -> Tensor:
        """The mean loss of one batch at these parameters, a scalar."""
        return self.criterion(self.outputs(parameters, inputs), targets)

    def value(self, vector: Tensor | None = None) -> float:
        """The mean loss over the data at ``vector`` (``None``: at the weights); one forward pass."""
        parts = self.split(self.weights() if vector is None else vector)
        with self.untouched(), torch.no_grad():
            total = sum(share * float(self.loss(parts, x, y)) for x, y, share in self.data())
        return float(self.reduced(_cpu(total)))

    def value_and_gradient(self, vector: Tensor | None = None) -> tuple[float, Tensor]:
        """The mean loss and its gradient, shape ``(size,)``, at ``vector`` (``None``: at the weights)."""
        parts = [
            p.detach().requires_grad_() for p in self.split(self.weights() if vector is None else vector)
        ]
        total, gradient = 0.0, torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with self.untouched(), torch.enable_grad():
            for inputs, targets, share in self.data():
                loss = self.loss(parts, inputs, targets)
                grads = torch.autograd.grad(loss, parts, allow_unused=True, materialize_grads=True)
                total += share * float(loss.detach())
                gradient += share * self.flat(grads)
        value = self.reduced(_cpu(total))
        return float(value), self.reduced(gradient)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the chosen parameters as one vector of shape ``(size,)``."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self.dtype)

    def reduced(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, when the data are shared among ranks."""
        if self.all_reduce:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor

    # ------------------------------------------------------------------ the first pass

    def _measure_once(self, named: bool) -> None:
        """Count and check the data; keep loss, gradient norm and weight norm. Costs one gradient."""
        digest, sizes = hashlib.sha256(), []
        leaves = self.leaves()
        used = [False] * len(leaves)
        total, gradient = 0.0, torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.examples = 1
        self.weights_of_batches = None
        self.mean = Mean(self.criterion, not self.all_reduce or torch.distributed.get_world_size() == 1)
        watch = AutocastWatch(self.device)
        with self.untouched(), torch.enable_grad():
            for index, (inputs, targets, share) in enumerate(self.data()):
                if index == 0:
                    self._meet(leaves, inputs, targets)
                with watch:
                    output = self.outputs(leaves, inputs)
                self.rows &= output.shape[:1] == (int(share),)
                check_labels(output, targets, self.criterion, index)
                try:
                    with Divisors() as seen:
                        loss = self.criterion(output, targets)
                except IndexError as error:
                    raise ValueError(f"the criterion fails on batch {index}: {error}") from error
                check_shape(loss)
                run = partial(self._part, leaves, inputs, targets)
                if index == 0:
                    self.classes = 0 if self.whole else classes_of(output, targets, seen.labelled)
                    self._check_first(loss, leaves, inputs, targets)
                with torch.random.fork_rng(self._cuda()):  # a random loss must not move the loader's numbers
                    weight = self.mean.add(seen, output, targets, int(share), run)
                check_loss(loss, index)
                grads = self._gradients(loss, leaves)
                used = [u or g is not None for u, g in zip(used, grads, strict=True)]
                total += weight * float(loss.detach())
                parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
                gradient += weight * self.flat(parts)
                sizes.append(int(share))
                hash_into(digest, inputs, targets)
        if not sizes:
            raise ValueError("batches is empty; allowed: at least one (inputs, targets) pair")
        mine = [total, float(sum(sizes)), sum(self.mean.weights)]
        summed = self.reduced(_cpu(mine))
        self.examples, self.counted = int(summed[1]), float(summed[2])
        self.weights_of_batches = self.mean.weights
        self.batch_sizes = tuple(sizes)
        self.autocast = watch.found
        self.initial_loss = float(summed[0]) / self.counted
        self.gradient = self.reduced(gradient) / self.counted
        self.data_hash = self._hash_of_all(digest.digest())
        self._drop_unused(used, named)

    def _meet(self, leaves: list[Tensor], inputs: Any, targets: Any) -> None:
        """How forward, criterion and outputs go together, tried on a few examples of the first batch."""
        few = slice(0, 3)
        self.differentiates = True  # until it is known
        with torch.random.fork_rng(self._cuda()):
            with GradientWatch() as watch:
                raw = self.outputs(leaves, take(inputs, few), raw_alone=True)
            self.differentiates = watch.found
            floating = [t for t in tree_leaves(raw) if isinstance(t, Tensor) and t.is_floating_point()]
            if floating:
                self.criterion = alongside(self.criterion, floating[0].device, floating[0].dtype)
            if takes_whole(self.criterion, copied(raw), copied(take(targets, few))):
                self.criterion = WholeOutput(self.criterion)
        self.mean.criterion = self.criterion
        count = first_tensor(take(inputs, few)).shape[0]
        self.rows = self.whole or logits(raw).shape[:1] == (count,)

    def _cuda(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _check_first(self, loss: Tensor, leaves: list[Tensor], inputs: Any, targets: Any) -> None:
        if name := bypassed(loss, self.model):
            raise ValueError(
                f"the loss reads the model's parameter {name!r} itself and not through the model's call, so that "
                "part would count as a constant; allowed: a loss of outputs and targets, the rest being the "
                "model's to return"
            )
        with torch.random.fork_rng(self._cuda()):
            check_mean(lambda x, y: self.loss(leaves, x, y), inputs, targets)

    def _gradients(self, loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(leaves)
        try:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            raise reentrant(error) or error from error
        for name, gradient in zip(self.names, grads, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"parameter {name!r} has a sparse gradient, as of F.embedding(…, sparse=True); allowed: dense "
                    "ones, with sparse=False"
                )
        return grads

    @torch.no_grad()
    def _part(self, leaves: list[Tensor], inputs: Any, targets: Any, part: slice) -> tuple[Any, Any]:
        return self.outputs(leaves, take(inputs, part)), take(targets, part)

    def _hash_of_all(self, mine: bytes) -> str:
        """One hash of the data of all ranks, in the ranks' order."""
        whole = [torch.tensor(list(mine), dtype=torch.uint8, device=self.device)]
        if self.all_reduce:
            whole *= torch.distributed.get_world_size()
            whole = [part.clone() for part in whole]
            torch.distributed.all_gather(whole, whole[0].clone())
            return hashlib.sha256(bytes(torch.cat(whole).tolist())).hexdigest()[:16]
        return mine.hex()[:16]

    def _drop_unused(self, used: list[bool], named: bool) -> None:
        self.left_out = tuple(n for n, u in zip(self.names, used, strict=True) if not u)
        if not self.left_out:
            return
        if moving := hidden(self, self.left_out):
            raise ValueError(
                f"parameter {listed(moving)} changes the loss, but no gradient reaches it: {WAYS}; "
                "mend the model or name other parameters in params"
            )
        if named or len(self.left_out) == len(self.names):
            raise ValueError(
                f"no effect on the loss: parameter {listed(self.left_out)}; name others in params"
            )
        told = listed(self.left_out)
        warnings.warn(f"left out, as they have no effect on the loss: {told}", stacklevel=4)
        kept = [s for name, s in self.slices().items() if name not in self.left_out]
        self.gradient = torch.cat([self.gradient[s] for s in kept])
        self.names = tuple(n for n in self.names if n not in self.left_out)
