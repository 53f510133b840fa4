"""Batches of token models: the model's arguments, and the embedding layer whose output is attacked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from conadv_lab.data.transfer import sent

IDS = "input_ids"
MASK = "attention_mask"


@dataclass(frozen=True)
class Tokens:
    """A batch of token sequences.

    The ``images`` of its `Batch` are perturbations of the embeddings (m, T, d), zero for clean ones.

    Attributes:
        parts: the model's argument, ids (m, T), or its keyword arguments, with ``input_ids``.
        layer: the model's embedding layer, ids (m, T) to (m, T, d).
    """

    parts: Tensor | Mapping[str, Tensor]
    layer: nn.Module

    @property
    def ids(self) -> Tensor:
        return self.parts if isinstance(self.parts, Tensor) else self.parts[IDS]

    @property
    def mask(self) -> Tensor | None:
        """(m, T), 0 at padding; None if the batch has no such mask."""
        mask = None if isinstance(self.parts, Tensor) else self.parts.get(MASK)
        return mask if mask is not None and mask.shape == self.ids.shape else None

    def tensors(self) -> list[Tensor]:
        return [self.parts] if isinstance(self.parts, Tensor) else list(self.parts.values())

    def on(self, device: Any) -> "Tokens":
        if isinstance(self.parts, Tensor):
            return Tokens(sent(self.parts, device), self.layer)
        return Tokens({name: sent(part, device) for name, part in self.parts.items()}, self.layer)

    def unmoved(self) -> Tensor:
        """Zeros (m, T, d) that take no memory."""
        weight = getattr(self.layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"embeddings is a {type(self.layer).__name__}; allowed: the model's embedding layer, such as "
                "model.get_input_embeddings()"
            )
        return weight.detach().new_zeros(()).expand(*self.ids.shape, weight.shape[1])

    def outputs(self, model: nn.Module, moved: Tensor) -> Any:
        """The model's outputs with a perturbation (m, T, d) added to the embeddings."""
        is_added = False

        def add(_layer: nn.Module, _ids: Any, embeddings: Tensor) -> Tensor:
            nonlocal is_added
            if is_added:  # a second call, as of a decoder that shares the layer
                return embeddings
            if embeddings.shape != moved.shape:
                raise ValueError(
                    f"the embeddings have the shape {tuple(embeddings.shape)}, their perturbation "
                    f"{tuple(moved.shape)}; allowed: a method that does not split a batch"
                )
            is_added = True
            return embeddings + moved

        handle = self.layer.register_forward_hook(add)
        try:
            outputs = model(self.parts) if isinstance(self.parts, Tensor) else model(**self.parts)
        finally:
            handle.remove()
        if not is_added:
            raise ValueError(
                "the model did not call the layer passed as embeddings; allowed: a layer of this model, such as "
                "model.get_input_embeddings()"
            )
        return outputs
