"""CUDA graphs without CUDA: a recorder of a part's operators, and a replayer of them on the same tensors.

As a graph does, a replay runs the operators that were recorded, and no Python: each reads and writes the very memory
that it read and wrote when it was recorded. What could not be captured on a GPU is refused here too. What a part runs
outside its graphs is called between them, while they are recorded and in every replay.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from conadv_lab.capture.replays import CannotCapture
from conadv_lab.outside import Call as Outside
from conadv_lab.outside import broken_by

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
        if self.broken and operator.namespace != "profiler":
            raise RuntimeError("operation failed due to a previous error during capture")
        why = "sends a message" if operator.namespace == "c10d" else READS.get(operator)
        if why:
            self.broken = True  # as CUDA breaks off a capture: every operator after it raises too
            raise CannotCapture(f"{operator} {why}")
        kwargs = kwargs or {}
        returned = operator(*args, **kwargs)
        self.calls.append(Call(operator, (_as_given((args, kwargs))), tree_map(_alias, returned)))
        return returned

    def signature(self, made: set[int]) -> list[Any]:
        """The operators with shapes, numbers, and where each tensor lies that is not ``made`` by one of them."""
        lines = []
        for call in self.calls:
            given = tree_flatten(call.given)[0]
            lines.append((str(call.operator), [_described(value, made) for value in given]))
            own = {_place(v) for v in given if isinstance(v, Tensor)}
            made.update({_place(v) for v in tree_flatten(call.returned)[0] if isinstance(v, Tensor)} - own)
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


class Recording:
    """One part's segments, as it was recorded, and what it ran between them."""

    def __init__(self) -> None:
        self.segments: list[Recorder] = []
        self.between: list[Outside] = []
        self._open = ExitStack()

    def of(self, part: Callable[[], Any]) -> Any:
        """Run a part and record it; returns its result."""
        with broken_by(self._break), self._open:
            self._begin()
            return part()

    def _begin(self) -> None:
        self.segments.append(self._open.enter_context(Recorder()))

    def _break(self, call: Outside) -> None:
        self._open.close()
        self.between.append(call)
        call()
        self._begin()

    def signature(self) -> list[list[Any]]:
        """By segment, the operators with shapes, numbers, and where each tensor lies that no segment has made."""
        made: set[int] = set()
        return [segment.signature(made) for segment in self.segments]

    def replay(self) -> None:
        self.segments[0].replay()
        for call, segment in zip(self.between, self.segments[1:], strict=True):
            call()
            segment.replay()


class Recordings:
    """A `conadv_lab.capture.replays.Backend` without a GPU."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def run(self, part: Callable[[], Any]) -> Any:
        return part()

    def capture(self, part: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        recording = Recording()
        result = recording.of(part)
        self.captured += 1
        return result, recording.replay

    def replay(self, graph: Callable[[], None]) -> None:
        self.replayed += 1
        graph()


class Listening(Recordings):
    """Records every part that it runs, and replays none."""

    def __init__(self) -> None:
        super().__init__()
        self.recordings: list[Recording] = []

    def run(self, part: Callable[[], Any]) -> Any:
        self.recordings.append(Recording())
        return self.recordings[-1].of(part)
