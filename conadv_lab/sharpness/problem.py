"""What is measured: a model, a loss and batches as a function of one flat vector; the model is untouched."""

import copy
import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from conadv_lab.mistakes import require, unknown

Criterion = Callable[[Tensor, Any], Tensor]
Batch = tuple[Any, Any]

BN_MODES = ("eval", "train")


def to_device(data: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The same nest of tensors on ``device``, its floating tensors as ``dtype`` (``None`` keeps theirs)."""
    if isinstance(data, Tensor):
        return data.to(device, dtype if data.is_floating_point() else None)
    if isinstance(data, Mapping):
        return {key: to_device(value, device, dtype) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return tuple(to_device(value, device, dtype) for value in data)
    return data


def first_tensor(data: Any) -> Tensor:
    """The first tensor of a batch's inputs or targets; its first axis counts the examples."""
    if isinstance(data, Tensor):
        return data
    if isinstance(data, Mapping):
        return first_tensor(next(iter(data.values())))
    if isinstance(data, (list, tuple)) and data:
        return first_tensor(data[0])
    raise ValueError(f"a batch is (inputs, targets) of tensors; got {type(data).__name__}")


def take(data: Any, index: slice | Tensor) -> Any:
    """Some examples of a nest of tensors, by their place on the first axis."""
    if isinstance(data, Tensor):
        return data[index] if data.ndim else data
    if isinstance(data, Mapping):
        return {key: take(value, index) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return tuple(take(value, index) for value in data)
    return data


def logits(output: Any) -> Tensor:
    """The tensor that the criterion judges: the output itself, its ``logits``, or its first part."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(
        f"the model returned {type(output).__name__}; allowed: a tensor, or something with .logits"
    )


def _generators(batches: Any) -> list[torch.Generator]:
    sources = [batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]
    found = [getattr(source, "generator", None) for source in sources]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _seed_all(seed: int) -> None:
    # Not torch.manual_seed: before CUDA starts, each call of that queues a stack trace for ever.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - augmentations of others may draw from it


@contextmanager
def untouched(model: nn.Module, batches: Any, bn: str, seed: int) -> Iterator[None]:
    """Set modes and random state for one evaluation, and put everything back, also after an exception.

    Every module is in evaluation mode, batch norm in train mode if ``bn == "train"``. The flags are set one
    by one, since a model may have overridden ``train()``.
    """
    modes = [(module, module.training) for module in model.modules()]
    generators = [(g, g.get_state()) for g in _generators(batches)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others may use
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        for module, _ in modes:
            module.training = bn == "train" and isinstance(module, _BatchNorm)
        _seed_all(seed)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for generator, state in generators:
            generator.set_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


class Problem:
    """A loss over a data set as a function of the chosen parameters, laid end to end in one vector.

    The weights are copied when the problem is made: it is a snapshot, whatever happens to the model later.

    Args:
        model: any module. Its first output tensor (or ``.logits``) goes to the criterion.
        criterion: ``criterion(output, targets)``, a scalar that is the **mean** over the batch's examples.
        batches: ``(inputs, targets)`` pairs that can be gone through many times: a list or a ``DataLoader``.
            One pair is one batch; a generator is read into a list. Inputs may be a tensor, a tuple
            (``model(*inputs)``) or a mapping (``model(**inputs)``). The first axis counts examples.
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
        self.model, self.criterion, self.bn, self.seed = model, criterion, bn, seed
        self.all_reduce = all_reduce
        self.batches = _reusable(batches)
        tensors = dict(model.named_parameters())
        if not tensors:
            raise ValueError(f"the model {type(model).__name__} has no parameters; nothing can be measured")
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"parameter {name!r} holds NaN or infinity; allowed: finite weights")
        self.compute_dtype = dtype
        sample = next((t for t in tensors.values() if t.is_floating_point()), None)
        require(sample is not None, "parameters", list(tensors), "floating-point tensors")
        assert sample is not None
        self.device = sample.device
        self.precision = dtype or sample.dtype
        self.dtype = torch.float64 if self.precision == torch.float64 else torch.float32
        self._all = {name: to_device(t.detach().clone(), t.device, dtype) for name, t in tensors.items()}
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.names = _chosen(model, tensors, params)
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
            parts.append(vector[start : start + tensor.numel()].view(tensor.shape).to(tensor.dtype))
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

    def groups(self, m: int | None = None) -> Iterator[tuple["Problem", float]]:
        """The data in disjoint groups of at most ``m`` (``None``: the batches as given), each with its share.

        A group is a problem of its own; a batch whose size ``m`` does not divide leaves a smaller last one.
        """
        with self.untouched():
            for inputs, targets, share in self.data():
                size = first_tensor(inputs).shape[0]
                for start in range(0, size, m or size):
                    part = slice(start, min(start + (m or size), size))
                    group, count = copy.copy(self), part.stop - part.start
                    group.batches = [(take(inputs, part), take(targets, part))]
                    group.examples, group.batch_sizes = count, (count,)
                    yield group, share * count / size

    # ------------------------------------------------------------------ the function

    def untouched(self) -> Any:
        """The context in which batches are read and the model is run; see :func:`untouched`."""
        return untouched(self.model, self.batches, self.bn, self.seed)

    def data(self) -> Iterator[tuple[Any, Any, float]]:
        """Each batch on the device, with its share of all examples (ragged batches are weighted rightly)."""
        for inputs, targets in self.batches:
            inputs = to_device(inputs, self.device, self.compute_dtype)
            targets = to_device(targets, self.device, self.compute_dtype)
            yield inputs, targets, first_tensor(inputs).shape[0] / self.examples

    def outputs(self, parameters: Sequence[Tensor], inputs: Any) -> Tensor:
        """The model's outputs at these parameters; buffers are copies, so running statistics stay."""
        state = dict(self._all)
        state.update(zip(self.names, parameters, strict=True))
        for name, buffer in self.buffers.items():
            state[name] = to_device(buffer.clone(), buffer.device, self.compute_dtype)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        else:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return logits(torch.func.functional_call(self.model, state, args, kwargs))

    def loss(self, parameters: Sequence[Tensor], inputs: Any, targets: Any) -> Tensor:
        """The mean loss of one batch at these parameters, a scalar."""
        return self.criterion(self.outputs(parameters, inputs), targets)

    def value(self, vector: Tensor | None = None) -> float:
        """The mean loss over the data at ``vector`` (``None``: at the weights); one forward pass."""
        parts = self.split(self.weights() if vector is None else vector)
        with self.untouched(), torch.no_grad():
            total = sum(share * float(self.loss(parts, x, y)) for x, y, share in self.data())
        return float(self.reduced(torch.tensor(total, dtype=torch.float64)))

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
        value = self.reduced(torch.tensor(total, dtype=torch.float64))
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
        with self.untouched(), torch.enable_grad():
            for index, (inputs, targets, share) in enumerate(self.data()):
                output = self.outputs(leaves, inputs)
                check_labels(output, targets, self.criterion, index)
                loss = self.criterion(output, targets)
                _check_loss(loss, index)
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
                used = [u or g is not None for u, g in zip(used, grads, strict=True)]
                total += share * float(loss.detach())
                parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
                gradient += share * self.flat(parts)
                sizes.append(int(share))
                _hash_into(digest, inputs, targets)
                if index == 0:
                    self._check_mean(leaves, inputs, targets)
        if not sizes:
            raise ValueError("batches is empty; allowed: at least one (inputs, targets) pair")
        summed = self.reduced(torch.tensor([total, float(sum(sizes))], dtype=torch.float64))
        self.examples = int(summed[1])
        self.batch_sizes = tuple(sizes)
        self.initial_loss = float(summed[0]) / self.examples
        self.gradient = self.reduced(gradient) / self.examples
        self.data_hash = digest.hexdigest()[:16]
        self._drop_unused(used, named)

    def _drop_unused(self, used: list[bool], named: bool) -> None:
        self.left_out = tuple(n for n, u in zip(self.names, used, strict=True) if not u)
        if not self.left_out:
            return
        listed = ", ".join(map(repr, self.left_out[:5])) + (" …" if len(self.left_out) > 5 else "")
        if named or len(self.left_out) == len(self.names):
            raise ValueError(f"no effect on the loss: parameter {listed}; name others in params")
        warnings.warn(f"left out, as they have no effect on the loss: {listed}", stacklevel=4)
        kept = [s for name, s in self.slices().items() if name not in self.left_out]
        self.gradient = torch.cat([self.gradient[s] for s in kept])
        self.names = tuple(n for n in self.names if n not in self.left_out)

    def _check_mean(self, leaves: list[Tensor], inputs: Any, targets: Any) -> None:
        """A mean does not change when the batch is doubled; a sum doubles."""
        few = slice(0, min(8, first_tensor(inputs).shape[0]))
        index = torch.arange(first_tensor(inputs).shape[0], device=self.device)[few]
        twice = torch.cat([index, index])
        with torch.no_grad():
            once = float(self.loss(leaves, take(inputs, index), take(targets, index)))
            double = float(self.loss(leaves, take(inputs, twice), take(targets, twice)))
        if abs(double - 2 * once) < abs(double - once):
            raise ValueError(
                f"the criterion sums over the batch (loss {once:.4g} on {len(index)} examples, {double:.4g} "
                "on the same twice); allowed: the mean, as with reduction='mean'"
            )


def _reusable(batches: Any) -> Any:
    if isinstance(batches, tuple) and len(batches) == 2 and not isinstance(batches[0], (tuple, list)):
        return [batches]
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is {type(batches).__name__}; allowed: a list or loader of (inputs, targets)"
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def _chosen(model: nn.Module, tensors: Mapping[str, Tensor], params: Sequence[str] | None) -> tuple[str, ...]:
    if params is None:
        names = tuple(name for name, tensor in tensors.items() if tensor.requires_grad)
        require(bool(names), "params", params, "names, since no parameter of the model requires a gradient")
        return names
    params = [params] if isinstance(params, str) else list(params)
    require(bool(params), "params", params, "at least one name of a parameter or module")
    modules = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    wanted: set[str] = set()
    for asked in params:
        found = [name for name in tensors if name == asked or name.startswith(asked + ".")]
        if not found:
            raise unknown("parameter", asked, [*tensors, *modules])
        wanted.update(found)
    return tuple(name for name in tensors if name in wanted)


def check_labels(output: Tensor, targets: Any, criterion: Criterion, index: int) -> None:
    """Refuse class labels beyond the outputs' classes, which a GPU would answer with an abort."""
    whole = isinstance(targets, Tensor) and targets.dtype in (torch.int64, torch.int32, torch.uint8)
    if not whole or output.ndim != targets.ndim + 1 or targets.numel() == 0:
        return
    kept = targets[targets != getattr(criterion, "ignore_index", -100)]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= output.shape[1]):
        worst = int(kept.max()) if int(kept.max()) >= output.shape[1] else int(kept.min())
        raise ValueError(
            f"label {worst} in batch {index}; allowed: 0 to {output.shape[1] - 1}, the outputs' classes"
        )


def _check_loss(loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the criterion returned {shape}; allowed: one number, the mean over the batch")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of batch {index} is {float(loss.detach())}; allowed: a finite number")
    if not loss.requires_grad:
        raise ValueError("no effect on the loss: none of the chosen parameters; name others in params")


def _hash_into(digest: Any, *data: Any) -> None:
    for item in data:
        if isinstance(item, Tensor):
            digest.update(item.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            _hash_into(digest, *item.values())
        elif isinstance(item, (list, tuple)):
            _hash_into(digest, *item)
