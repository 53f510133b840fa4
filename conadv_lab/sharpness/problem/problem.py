"""What is measured: a model, a loss and batches as a function of one flat vector; does not change the model."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conadv_lab.criteria import logits
from conadv_lab.mistakes import unknown
from conadv_lab.sharpness.problem.checks import reusable
from conadv_lab.sharpness.problem.first_pass import go_through
from conadv_lab.sharpness.problem.judging import WholeOutput
from conadv_lab.sharpness.problem.means import Mean
from conadv_lab.sharpness.problem.nests import copied, cpu, first_tensor, pair, to_device
from conadv_lab.sharpness.problem.precision import arithmetic, autocast_around, roundoff, under
from conadv_lab.sharpness.problem.sameness import Passes
from conadv_lab.sharpness.problem.snapshot import Snapshot
from conadv_lab.sharpness.problem.untouched import untouched
from conadv_lab.sharpness.problem.wrappers import require_whole, unwrapped

Criterion = Callable[[Tensor, Any], Tensor]
Batch = tuple[Any, Any]

BN_MODES = ("eval", "train")


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor if it already requires a gradient or cannot, else a leaf with the same values."""
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return tensor if tensor.requires_grad or not differentiable else tensor.detach().requires_grad_()


class Problem(Snapshot):
    """A loss over a data set as a function of the chosen parameters, concatenated into one vector.

    The weights are copied when the problem is created: it is a snapshot, whatever happens to the model later.

    Args:
        model: any module. Its first output tensor (or ``.logits``) goes to the criterion.
        criterion: ``criterion(output, targets)``, a scalar that is the **mean** over the batch's examples, or
            over labels with some ignored or weighted, if one of torch's losses does that: batches are weighted by
            its divisor. Any other mean needs all data as one batch.
        batches: ``(inputs, targets)`` pairs that can be iterated repeatedly: a list or a ``DataLoader``.
            One pair is one batch; a generator is read into a list. Inputs may be a tensor, a tuple
            (``model(*inputs)``) or a mapping (``model(**inputs)``). A batch may also be one mapping that
            contains ``labels``. The first axis indexes examples.
        params: names of parameters or of modules (all of the module's parameters), or ``None`` for every
            parameter that requires a gradient and has an effect on the loss.
        bn: ``"eval"`` uses batch norm's running statistics, ``"train"`` each batch's own. Other layers, such
            as dropout, are always in evaluation mode.
        dtype: compute in this dtype; ``None``: the model's own. Sums over batches are at least float32.
        all_reduce: each rank of ``torch.distributed``'s default group has part of the data.
        seed: of anything random inside the data loader.

    Attributes:
        names: of the chosen parameters; left_out: of those without effect on the loss.
        mean: what the loss divides by; counted: its sum over all data (examples, if all count equally).
        rows: whether the outputs' first axis indexes the examples; classes: on axis 1, 0 if there are none.
        examples: on all ranks; batch_sizes: on this one.
        autocast: autocast dtype of the model's forward pass, ``None`` without autocast.
        initial_loss, gradient: at the weights, over all data.
        data_hash: of all inputs and targets.

    Raises:
        ValueError: no batch, no parameter, unknown name, labels out of range, NaN weights, a loss that is not
            finite or not a mean, a named parameter without effect.

    >>> model = nn.Linear(3, 2)
    >>> problem = Problem(model, nn.functional.cross_entropy, (torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))
    >>> problem.size, problem.examples
    (8, 4)
    """

    left_out: tuple[str, ...]
    mean: Mean
    counted: float
    rows: bool
    classes: int
    examples: int
    batch_sizes: tuple[int, ...]
    autocast: torch.dtype | None
    initial_loss: float
    gradient: Tensor
    data_hash: str

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
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; allowed: a torch.dtype, such as torch.float64, or None")
        if torch.is_inference_mode_enabled():
            raise ValueError("torch.inference_mode is on, which disables gradients; measure outside of it")
        model = unwrapped(model)
        require_whole(model)
        self.criterion, self.bn, self.seed = criterion, bn, seed
        self.all_reduce = all_reduce
        self.weights_of_batches: list[float] | None = None
        self.batches = reusable(batches)
        self._passes: Iterable[Batch] = Passes(self.batches)
        super().__init__(model, params, dtype)
        self._autocast_around = autocast_around(self.device)
        self.differentiates = False
        go_through(self, named=params is not None)

    def restricted(self, names: Sequence[str]) -> "Problem":
        """The same problem as a function of some of its parameters, without another pass over the data."""
        part = copy.copy(self)
        slices = self.slices()
        part.names = tuple(name for name in self.names if name in set(names))
        part.gradient = torch.cat([self.gradient[slices[name]] for name in part.names])
        return part

    def with_criterion(self, criterion: Criterion) -> "Problem":
        """The same problem with another criterion."""
        other = copy.copy(self)
        other.criterion = criterion
        return other

    def use(self, batches: list[Batch]) -> None:
        """Use these few batches, on this rank alone, instead of all the data."""
        self.all_reduce, self.weights_of_batches = False, None
        self.batches = self._passes = batches
        self.batch_sizes = tuple(first_tensor(inputs).shape[0] for inputs, _ in batches)
        self.examples = sum(self.batch_sizes)

    @property
    def arithmetic(self) -> str:
        """The model's arithmetic, including autocast, as named in reports."""
        return arithmetic(self.precision, self.autocast, self.device)

    @property
    def roundoff(self) -> float:
        """The relative spacing of the coarsest numbers that take part."""
        return roundoff(self.precision, self.autocast, self.device)

    @property
    def whole(self) -> bool:
        """Whether the criterion takes the model's whole output."""
        return isinstance(self.criterion, WholeOutput)

    def require_one_output(self, what: str, rows: bool = False) -> None:
        """Raise unless the outputs are one tensor, with one row per example if ``rows``.

        Raises:
            ValueError: the criterion takes the model's whole output, or the first axis does not index examples.
        """
        if self.whole:
            raise ValueError(
                f"{what} needs one output tensor, but the criterion takes the model's whole output"
            )
        if rows and not self.rows:
            raise ValueError(f"{what} needs outputs whose first axis indexes the examples")

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The context for reading batches and running the model; see :func:`untouched`.

        Autocast is as it was when the problem was created.
        """
        with (
            untouched(self.model, self.batches, self.bn, self.seed),
            under(self._autocast_around, self.device),
        ):
            yield

    def data(self) -> Iterator[tuple[Any, Any, float]]:
        """Each batch on the device, with its share of the loss's divisor, such as of all examples."""
        for index, batch in enumerate(self._passes):
            inputs, targets = pair(batch)
            inputs = to_device(inputs, self.device, self.compute_dtype)
            targets = copied(to_device(targets, self.device, self.compute_dtype))
            if self.weights_of_batches is None:
                yield inputs, targets, first_tensor(inputs).shape[0] / self.examples
            else:
                yield inputs, targets, self.weights_of_batches[index] / self.counted

    def outputs(self, parameters: Sequence[Tensor], inputs: Any, raw_alone: bool = False) -> Any:
        """The model's outputs at these parameters; buffers are copies, so running statistics do not change.

        One tensor: the output, its ``logits``, its first part, or all parts packed if the criterion takes them all.
        With ``raw_alone`` the unchanged return value.
        """
        wanted = torch.is_grad_enabled()
        state = self._state(zip(self.names, parameters, strict=True))
        if self.differentiates:  # the forward pass takes gradients, perhaps in its weights
            state = {k: _leaf(t) for k, t in state.items()}
        for name, buffer in self.buffers.items():
            state[name] = to_device(buffer.clone(), buffer.device, self.compute_dtype)
        inputs = copied(inputs)  # a forward pass may modify its inputs, which belong to the caller
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

    def loss(self, parameters: Sequence[Tensor], inputs: Any, targets: Any) -> Tensor:
        """The mean loss of one batch at these parameters, a scalar."""
        return self.criterion(self.outputs(parameters, inputs), targets)

    def value(self, vector: Tensor | None = None) -> float:
        """The mean loss over the data at ``vector`` (``None``: at the weights); one forward pass."""
        parts = self.split(self.weights() if vector is None else vector)
        with self.untouched(), torch.no_grad():
            total = sum(share * float(self.loss(parts, x, y)) for x, y, share in self.data())
        return float(self.reduced(cpu(total)))

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
        value = self.reduced(cpu(total))
        return float(value), self.reduced(gradient)

    def reduced(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, when the data are shared among ranks."""
        if self.all_reduce:
            tensor = tensor.to(self.device)
            torch.distributed.all_reduce(tensor)
        return tensor
