"""CUDA graphs without CUDA: a recorder of a part's operators, and a replayer of them on the same tensors.

As a graph does, a replay runs the operators that were recorded, and no Python: each reads and writes the very memory
that it read and wrote when it was recorded. What could not be captured on a GPU is refused here too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from conadv_lab.capture.replays import CannotCapture

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default: "reads a value back",
    aten.is_nonzero.default: "reads a value back",
    aten.equal.default: "reads a value back",
    aten.nonzero.default: "has a size that depends on values",
    aten.masked_select.default: "has a size that depends on values",
    aten._unique2.default: "has a size that depends on values",
    aten.lift_fresh.default: "makes a tensor of the host's numbers",
    aten.lift_fresh_copy.default: "makes a tensor of the host's numbers",
}


@dataclass
class Call:
    """One operator: what it was given and what it returned, the tensors themselves."""

    operator: Any
    given: tuple[Any, dict[str, Any]]
    returned: Any


class Recorder(TorchDispatchMode):
    """Runs operators and keeps them in order; their tensors live on, so that each keeps a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.broken = False

    def __torch_dispatch__(self, operator: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        if operator in READS:
            self.broken = True  # as CUDA breaks off a capture: every operator after it raises too
            raise CannotCapture(f"{operator} {READS[operator]}")
        kwargs = kwargs or {}
        returned = operator(*args, **kwargs)
        self.calls.append(Call(operator, (_as_given((args, kwargs))), tree_map(_alias, returned)))
        return returned

    def signature(self) -> list[Any]:
        """The operators with shapes, numbers, and where each tensor lies that none of them has made."""
        made: set[int] = set()
        lines = []
        for call in self.calls:
            given = tree_flatten(call.given)[0]
            lines.append((str(call.operator), [_described(value, made) for value in given]))
            own = {_place(v) for v in given if isinstance(v, Tensor)}
            made |= {_place(v) for v in tree_flatten(call.returned)[0] if isinstance(v, Tensor)} - own
        return lines

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            args, kwargs = call.given
            again = call.operator(*args, **kwargs)
            both = zip(tree_flatten(call.returned)[0], tree_flatten(again)[0], strict=True)
            for there, new in both:
                if isinstance(there, Tensor) and _place(there) != _place(new):
                    there.copy_(new)


def _as_given(given: Any) -> Any:
    """Lists are copied, as their owners change them; tensors stay."""
    return tree_map(_alias, given)


def _alias(value: Any) -> Any:
    """A tensor of the same memory that nobody else reshapes or frees."""
    return value.detach() if isinstance(value, Tensor) else value


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _described(value: Any, made: set[int]) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    place = "made here" if _place(value) in made or value.numel() == 0 else value.data_ptr()
    return tuple(value.shape), str(value.dtype), place


class Recordings:
    """A `conadv_lab.capture.replays.Backend` without a GPU."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def run(self, part: Callable[[], Any]) -> Any:
        return part()

    def record(self, part: Callable[[], Any]) -> tuple[Any, Recorder]:
        with Recorder() as recorder:
            result = part()
        return result, recorder

    def capture(self, part: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result, recorder = self.record(part)
        self.captured += 1
        return result, recorder.replay

    def replay(self, graph: Callable[[], None]) -> None:
        self.replayed += 1
        graph()
