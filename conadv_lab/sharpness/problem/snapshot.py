"""A snapshot of a model's weights, the chosen ones as one vector."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from conadv_lab.mistakes import require
from conadv_lab.sharpness.problem.checks import chosen_names
from conadv_lab.sharpness.problem.nests import real_parts, to_device


class Snapshot:
    """Copies of a model's parameters and buffers, with the chosen parameters concatenated into one vector.

    Args:
        params: names of parameters or of modules; ``None`` for every parameter that requires a gradient.
        dtype: compute in this dtype; ``None``: the model's own.

    Raises:
        ValueError: no parameter, an unknown name, NaN or infinite weights.
    """

    def __init__(self, model: nn.Module, params: Sequence[str] | None, dtype: torch.dtype | None) -> None:
        self.model = model
        tensors = dict(model.named_parameters())
        if not tensors:
            raise ValueError(f"the model {type(model).__name__} has no parameters; nothing can be measured")
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"parameter {name!r} contains NaN or infinity; allowed: finite weights")
        self.compute_dtype = dtype
        self.complex_names = frozenset(name for name, t in tensors.items() if t.is_complex())
        parts = {name: real_parts(t.detach()) for name, t in tensors.items()}
        sample = next((t for t in parts.values() if t.is_floating_point()), None)
        require(sample is not None, "parameters", list(tensors), "floating-point tensors")
        assert sample is not None
        self.device = sample.device
        self.precision = dtype or sample.dtype
        self.dtype = torch.float64 if self.precision == torch.float64 else torch.float32
        self._all = {name: to_device(t.clone(), t.device, dtype) for name, t in parts.items()}
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.names = chosen_names(model, tensors, params)

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the chosen parameters, in the order of ``names``."""
        return [self._all[name].shape for name in self.names]

    @property
    def size(self) -> int:
        """The length of the vector: the number of values in the chosen parameters."""
        return sum(shape.numel() for shape in self.shapes)

    def weights(self) -> Tensor:
        """The chosen parameters as one new vector of shape ``(size,)``."""
        return torch.cat([self._all[name].reshape(-1).to(self.dtype) for name in self.names])

    def split(self, vector: Tensor) -> list[Tensor]:
        """Split a vector of shape ``(size,)`` into tensors like the chosen parameters, in the computing dtype."""
        parts, start = [], 0
        for name in self.names:
            tensor = self._all[name]
            part = vector[start : start + tensor.numel()].view(tensor.shape).to(tensor.dtype)
            # A complex view must not start at an odd offset.
            parts.append(part.clone() if name in self.complex_names else part)
            start += tensor.numel()
        return parts

    def slices(self) -> dict[str, slice]:
        """Each chosen parameter's slice of the vector."""
        result, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            result[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return result

    def leaves(self) -> list[Tensor]:
        """The chosen parameters as leaves of a new graph; they share the snapshot's memory."""
        return [self._all[name].detach().requires_grad_() for name in self.names]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the chosen parameters as one vector of shape ``(size,)``."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self.dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in this dtype from now on, apart from autocast."""
        self.compute_dtype = self.precision = self.dtype = dtype
        self._all = {name: to_device(t, t.device, dtype) for name, t in self._all.items()}

    def state_of(self, module: str) -> dict[str, Tensor]:
        """The snapshot's parameters and buffers of one module, by their names in it."""
        state, start = self._state() | self.buffers, module + "."
        return {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}

    def _state(self, chosen: Iterable[tuple[str, Tensor]] = ()) -> dict[str, Tensor]:
        """All parameters by name, with these replaced, as the model has them: complex ones rejoined from two parts."""
        state = self._all | dict(chosen)
        return state | {name: torch.view_as_complex(state[name]) for name in self.complex_names}
