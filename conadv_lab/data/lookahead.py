"""Steps over any loader, including the batches of upcoming steps."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conadv_lab.data.loader import Batch, Step
from conadv_lab.data.tokens import IDS, Tokens
from conadv_lab.data.transfer import sent
from conadv_lab.mistakes import require, require_count

IMAGES = ("images", "image", "pixel_values", "inputs", "input", "x")
LABELS = ("labels", "label", "targets", "target", "y")
ALLOWED = "allowed: (images, labels), or a mapping with keys for both"


def lookahead(
    loader: Iterable[Any],
    steps: int,
    ahead: int = 0,
    *,
    accumulate: int = 1,
    replays: int = 1,
    device: torch.device | str | None = None,
    embeddings: nn.Module | None = None,
) -> Iterator[Step]:
    """Steps over any loader of ``(images, labels)``, each with the batches of the next ``ahead`` steps.

    The loader is restarted when it ends, so the queue crosses epochs. Images are floats, in [0, 1] unless
    the attack has other bounds. An image's index, which random starts depend on, is its position in the loader's epoch.
    ``(ahead + 2) · accumulate`` batches stay in memory.

    A batch may also be a mapping such as ``{"pixel_values": …, "labels": …}``; tuple items after the first two are
    ignored. NumPy arrays become tensors, with torch's default dtype for floats.

    Args:
        loader: a list or a DataLoader, which can be iterated over repeatedly.
        steps: number of optimiser steps.
        ahead: how many steps the method looks ahead, ``method.lookahead``.
        accumulate: loader batches per step; each is a micro-batch, and its gradient is weighted by its image count.
        replays: how many consecutive steps have the same images, ``method.replays``.
        device: the model's device; None does not move the batches.
        embeddings: a token model's embedding layer, whose output is attacked, ``model.get_input_embeddings()``. A batch
            is then ``(ids, labels)``, ids (m, T), or a mapping of labels and the model's keyword arguments.

    Raises:
        ValueError: a number out of range, or a loader that is empty, cannot be restarted or yields no such batches.

    >>> loader = [(torch.zeros(4, 1, 2, 2), torch.zeros(4).long())] * 3
    >>> [[len(batch.labels) for batch in step.batches()] for step in lookahead(loader, steps=2, accumulate=2)]
    [[4, 4], [4, 4]]
    """
    require_count(0, steps=steps, ahead=ahead)
    require_count(accumulate=accumulate, replays=replays)
    source = islice(_endless(loader, device, embeddings), -(-steps // replays) * accumulate)
    held: dict[int, list[Batch]] = {}
    for number in range(steps):
        for wanted in range(number // replays, min(number + ahead, steps - 1) // replays + 1):
            if wanted not in held:
                held[wanted] = shared(list(islice(source, accumulate)))
        held = {fresh: batches for fresh, batches in held.items() if fresh >= (number - 1) // replays}
        yield step_of(dict(held), number, ahead, steps - 1, replays)


def shared(batches: list[Batch]) -> list[Batch]:
    """The micro-batches of one step, with shares proportional to their image counts."""
    images = sum(len(batch.labels) for batch in batches)
    return [replace(batch, share=len(batch.labels) / images) for batch in batches]


def step_of(held: dict[int, list[Batch]], number: int, ahead: int, last: int, replays: int) -> Step:
    """Step ``number`` from the micro-batches in ``held``, keyed by step number not counting replays."""

    def fetch(number: int) -> list[Batch]:
        return held[number // replays]

    def counts(number: int) -> list[int]:
        return [len(batch.labels) for batch in fetch(number)]

    return Step(number, ahead, last, fetch, counts, replays)


def _endless(
    loader: Iterable[Any], device: torch.device | str | None, embeddings: nn.Module | None
) -> Iterator[Batch]:
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ValueError(
            f"the loader is of type {type(loader).__name__}; allowed: a list or a DataLoader of batches"
        )
    epoch = 0
    while True:
        seen = 0
        for raw in loader:
            batch = batch_of(raw, epoch, seen, device, embeddings)
            seen += len(batch.labels)
            yield batch
        if seen == 0:
            when, which = (
                ("when it was restarted", ", which can be iterated over repeatedly") if epoch else ("", "")
            )
            raise ValueError(
                f"the loader yielded no batch {when}".rstrip()
                + f"; allowed: a list or a DataLoader of batches{which}"
            )
        epoch += 1


def batch_of(
    raw: Any, epoch: int, first: int, device: torch.device | str | None, embeddings: nn.Module | None = None
) -> Batch:
    """A loader's batch on the device; ``first`` is the index of its first image. See `lookahead`."""
    if embeddings is None:
        tokens, (images, labels) = None, images_and_labels(raw)
    else:
        tokens, labels = _tokens_and_labels(raw, embeddings)
        images = tokens.unmoved()
    if device is not None:
        tokens = tokens and tokens.on(torch.device(device))
        images, labels = sent(images, torch.device(device)), sent(labels, torch.device(device))
    indices = torch.arange(first, first + len(labels), device=labels.device)
    return Batch(images, labels, torch.full_like(indices, epoch), indices, 1.0, tokens)


def _tokens_and_labels(raw: Any, layer: nn.Module) -> tuple[Tokens, Tensor]:
    if isinstance(raw, Mapping):
        labels = _tensor(_named(raw, LABELS, "labels"), "labels")
        parts = {name: _tensor(part, name) for name, part in raw.items() if name not in LABELS}
        if IDS not in parts:
            raise ValueError(
                f"a batch has the keys {', '.join(raw)}; allowed: {IDS!r}, labels and the model's others"
            )
        tokens = Tokens(parts, layer)
    else:
        ids, labels = _two(raw)
        tokens, labels = Tokens(_tensor(ids, "ids"), layer), _tensor(labels, "labels")
    ids, count = tokens.ids, tuple(labels.shape[:1])
    if ids.ndim != 2 or ids.is_floating_point() or count != ids.shape[:1]:
        raise ValueError(
            f"token ids are {ids.dtype} of shape {tuple(ids.shape)}, labels of shape {tuple(labels.shape)}; allowed: "
            "integer ids (m, T), with m labels"
        )
    return tokens, labels if labels.is_floating_point() else labels.long()


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch as tensors of equal length.

    Raises:
        ValueError: it has no images or labels, or is not a batch.

    >>> images, labels = images_and_labels({"image": np.zeros((2, 1, 3, 3)), "label": np.array([1, 0])})
    >>> images.dtype, labels.tolist()
    (torch.float32, [1, 0])
    """
    images, labels = _two(batch)
    if isinstance(labels, (int, np.integer)) or (
        isinstance(labels, (Tensor, np.ndarray)) and not labels.ndim
    ):
        raise ValueError(
            f"the loader yields single images (this one with label {int(labels)}), as a Dataset does; allowed: "
            "batches, such as from torch.utils.data.DataLoader(dataset, batch_size=128)"
        )
    images, labels = _tensor(images, "images"), _tensor(labels, "labels")
    require(
        images.is_floating_point(), "the images' dtype", str(images.dtype),
        "floats in [0, 1], or token ids with lookahead(…, embeddings=model.get_input_embeddings())",
    )  # fmt: skip
    require(len(labels) > 0, "the number of images in a batch", 0, "at least 1")
    if len(images) != len(labels):
        raise ValueError(
            f"a batch has {len(images)} images and {len(labels)} labels; allowed: one label per image"
        )
    return images, labels if labels.is_floating_point() else labels.long()


def _two(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return _named(batch, IMAGES, "images"), _named(batch, LABELS, "labels")
    if isinstance(batch, (list, tuple)) and len(batch) >= 2:
        return batch[0], batch[1]
    size = f" and length {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    raise ValueError(f"a batch is of type {type(batch).__name__}{size}; {ALLOWED}")


def _named(batch: Mapping[Any, Any], names: tuple[str, ...], what: str) -> Any:
    found = [name for name in names if name in batch]
    if len(found) == 1:
        return batch[found[0]]
    keys = f"the keys {', '.join(map(str, batch))}" if batch else "no keys"
    raise ValueError(f"a batch has {keys}; allowed: one of {', '.join(names)} for the {what}")


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    if isinstance(values, list) and values and all(isinstance(value, (int, np.integer)) for value in values):
        return torch.tensor(values, device="cpu")
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise ValueError(
            f"the {what} of a batch are of type {type(values).__name__}; allowed: a tensor or a NumPy array"
        )
    # Copy, as torch warns about arrays that are not writable.
    return torch.tensor(
        values, dtype=torch.get_default_dtype() if values.dtype.kind == "f" else None, device="cpu"
    )
