"""How methods call any network: protects images from in-place forward passes and applies the criterion."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from conadv_lab.criteria import logits
from conadv_lab.data.tokens import Tokens

Criterion = Callable[[Tensor, Tensor], Tensor]

# Whether a network's forward pass modifies its input, in training and in evaluation mode; absent: not known yet.
_writes: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def outputs_of(model: nn.Module, images: Tensor, tokens: Tokens | None = None) -> Any:
    """``model(images)``; a forward that writes into its input, as ``x.sub_(0.5)`` does, gets a copy to write into.

    For token batches, ``images`` is the perturbation added to the embeddings.

    The first forward pass in each mode checks this on a copy, which synchronises with a GPU; later ones cost nothing.
    """
    if tokens is not None:
        return tokens.outputs(model, images)
    known = _writes.setdefault(model, {})
    if known.get(model.training) is False:
        return model(images)
    copy = images.clone()
    version = copy._version
    outputs = model(copy)
    if model.training not in known:
        # Compare values, as x.data.sub_(0.5) bypasses the version counter, and the counter, as values may stay equal.
        known[model.training] = copy._version > version or not torch.equal(copy, images)
    return outputs


class Judge:
    """Applies a criterion to a network's whole output if it accepts that, else to what `logits` finds."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self._takes_all: bool | None = None

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self.criterion(outputs, labels)
        if self._takes_all is None:
            self._takes_all = self._tried(outputs, labels)
        return self.criterion(outputs if self._takes_all else logits(outputs), labels)

    def _tried(self, outputs: Any, labels: Tensor) -> bool:
        try:
            self.criterion(outputs, labels)
        except (TypeError, AttributeError):
            return False
        return True


def rows_of(outputs: Any, first: int, last: int) -> Any:
    """The outputs of images ``first`` to ``last``: these rows of each tensor in a tuple, list or dict."""
    if isinstance(outputs, Tensor):
        return outputs[first:last]
    leaves, form = tree_flatten(outputs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):  # an object that torch cannot look into
        return logits(outputs)[first:last]
    cut = [leaf[first:last] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
    return tree_unflatten(cut, form)


def twice(outputs: Any) -> Any:
    """A batch's outputs repeated twice; None for an object that torch cannot traverse."""
    if isinstance(outputs, Tensor):
        return torch.cat([outputs, outputs])
    leaves, form = tree_flatten(outputs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    both = [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
    return tree_unflatten(both, form)
