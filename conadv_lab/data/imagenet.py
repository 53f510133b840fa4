"""ImageNet, or any folder of photographs with one subfolder per class, as a run's training and test set."""

import torch
from torch import Tensor

from conadv_lab.data.hashing import image_keys, uniform
from conadv_lab.data.imagenet_files import Numbers
from conadv_lab.data.imagenet_view import DRAWS, View
from conadv_lab.data.imagenet_workers import CHUNK, Draws, Readers, Reading
from conadv_lab.data.options import Data, Demand
from conadv_lab.data.pack_file import open_split
from conadv_lab.data.sets import require_images
from conadv_lab.data.transfer import sent
from conadv_lab.seeds import generator

FETCH_SLOTS = (0, 1)
"""Slots for unaugmented images; the others belong to the stream."""


class PhotoSet:
    """Photographs behind the `ImageSet` interface; a `PhotoStream` reads them augmented.

    Args:
        readers: the readers of this set and others.
        shown: the readers' number for this set, unaugmented.
        order: (N,) int64, the photograph at each index.
        seed: the run's; with epoch and index it decides crops, flips and all else that is random.
        drawn: the readers' number for this set, augmented; None for a test set.
        device: where images are delivered.
    """

    def __init__(
        self,
        readers: Readers,
        shown: int,
        order: Tensor,
        seed: int = 0,
        drawn: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.readers, self.shown, self.drawn = readers, shown, drawn
        self.seed, self.device = seed, torch.device(device)
        self.photos, _ = readers.sets[shown]
        self.classes = len(self.photos.classes)
        self._order = order.numpy()
        self._labels = torch.from_numpy(self.photos.labels[self._order])

    def __len__(self) -> int:
        return len(self._order)

    def to(self, device: torch.device) -> "PhotoSet":
        """The same photographs, delivered on a device."""
        self.device = device
        return self

    def labels(self, indices: Tensor) -> Tensor:
        """(m,) int64, on the device."""
        return sent(self._labels[indices.cpu()], self.device)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Centre-cropped images (m, 3, S, S) uint8 without augmentation, and labels (m,), on the device.

        Raises:
            OSError: an image cannot be read.
        """
        return self._read(self.shown, indices, None), self.labels(indices)

    def augmented(self, epochs: Tensor, indices: Tensor) -> Tensor:
        """Images (m, 3, S, S) uint8, each augmented for its epoch (m,), on the device.

        Raises:
            OSError: an image cannot be read.
        """
        return self._read(self._drawn_set(), indices, self._draws(epochs, indices))

    def begin(self, slot: int, epochs: Tensor, indices: Tensor) -> Reading:
        """Start reading augmented images into one of the readers' slots."""
        draws = self._draws(epochs, indices)
        return self.readers.begin(self._drawn_set(), slot, self._places(indices), draws)

    def _read(self, which: int, indices: Tensor, draws: Draws | None) -> Tensor:
        read = self.readers.read(which, FETCH_SLOTS, self._places(indices), draws)
        # A slot is reused: pinning copies it, and on the host it must be copied too.
        on_gpu = self.device.type == "cuda"
        pieces = [sent(piece, self.device) if on_gpu else piece.to(self.device, copy=True) for piece in read]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _drawn_set(self) -> int:
        assert self.drawn is not None, "a test set has no augmented images"
        return self.drawn

    def _draws(self, epochs: Tensor, indices: Tensor) -> Draws:
        return uniform(image_keys(self.seed, "photo", epochs, indices), DRAWS).numpy()

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.photos.fingerprint()}{self.readers.pixels_by}"

    def _places(self, indices: Tensor) -> Numbers:
        return self._order[indices.cpu().numpy()]


def read_ahead(workers: int, slot_images: int) -> int:
    """How many micro-batches to read ahead: two tasks per worker, and at least one micro-batch."""
    return 1 + 2 * workers * CHUNK // slot_images if workers else 0


def slots_of(section: Data, demand: Demand) -> tuple[int, int]:
    """(slots, images per slot) that the readers of a run need.

    The look-ahead attack and the step itself both read in the order of the run, so this is twice the read-ahead, plus
    ``keep_gb`` for images that the method reads again.
    """
    images = demand.micro_batch + (section.mixup > 0)
    largest = 3 * max(section.pixels, section.eval_pixels) ** 2 * images
    kept = int(section.keep_gb * 1e9 / largest) if demand.rereads else 0
    return len(FETCH_SLOTS) + 2 * (1 + read_ahead(section.workers, images)) + kept, images


def load_photographs(section: Data, demand: Demand, device: torch.device | str) -> tuple[PhotoSet, PhotoSet]:
    """Training and validation set: each a pack, a folder tree or the official archive, in ``data_dir``.

    The training set's indices are a fixed shuffle of its photographs, so that its first 10,000, on which the
    training accuracy is measured, cover all classes.

    Raises:
        ValueError: data that are missing or malformed, too many ``train_images``, or no DALI.
    """
    train = open_split(section.data_dir, "train")
    test = open_split(section.data_dir, "val", train.classes)
    count = len(train.labels)
    require_images(section, count)
    resize = section.eval_resize or round(section.eval_pixels * 256 / 224)
    shown = View(section.eval_pixels, resize)
    drawn = View(section.pixels, resize, section.crop_scale, section.flip, section.policy, section.erasing)
    sets = [(train, drawn), (train, shown), (test, shown)]
    if section.reader == "dali":
        from conadv_lab.data.imagenet_dali import DaliReaders

        readers: Readers = DaliReaders(sets, section.workers, *slots_of(section, demand), device=device)
    else:
        readers = Readers(sets, section.workers, *slots_of(section, demand))
    order = torch.randperm(count, generator=generator(0, "subset"), device="cpu")[: section.train_images]
    return (
        PhotoSet(readers, 1, order, demand.seed, drawn=0, device=device),
        PhotoSet(readers, 2, torch.arange(len(test.labels), device="cpu"), device=device),
    )
