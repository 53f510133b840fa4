"""The config's data section, and what is known of a data set before reading it. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

from conadv_lab.mistakes import COUNT, COUNT_OR_0, FROM_0, SHARE, require_ranges, unknown
from conadv_lab.references import is_file_reference
from conadv_lab.registry import Entry, described


@dataclass(frozen=True)
class Source(Entry):
    """A named data set; its function makes a training and a test set from a section, a `Demand` and a device.

    Attributes:
        photographs: whether images are files of any size, cropped and augmented while they are read.
        shape: (channels, height, width); None if the section decides.
        classes, images: of the training set; None if the files or the section decide.
        official: whether the files are the same everywhere, so that these are known without reading them.
    """

    photographs: bool = False
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    images: int | None = None
    official: bool = False


_CIFAR, _PHOTOGRAPHS = "conadv_lab.data.cifar:cifar_sets", "conadv_lab.data.imagenet:load_photographs"
DATASETS = {
    "digits": Source(
        "scikit-learn's 8x8 digits", "conadv_lab.data.digits:digits_sets", False, (1, 8, 8), 10, 898
    ),
    "cifar10": Source("CIFAR-10", _CIFAR, False, (3, 32, 32), 10, 50_000, official=True),
    "cifar100": Source("CIFAR-100", _CIFAR, False, (3, 32, 32), 100, 50_000, official=True),
    "imagenet": Source("ImageNet's photographs", _PHOTOGRAPHS, True, None, 1000, 1_281_167),
    "photographs": Source(
        "any other photographs, in train/CLASS and val/CLASS of data_dir", _PHOTOGRAPHS, True
    ),
    "synthetic": Source(
        "random images and labels of any number and size",
        "conadv_lab.data.synthetic:synthetic_sets",
        classes=10,
    ),
}
"""Every data set by name; a new one is a file with its function and a line here."""
OWN = Source("user-defined", "")


@dataclass(frozen=True)
class Demand:
    """What a run needs from its data.

    Attributes:
        seed: the run's.
        global_batch: images per step.
        micro_batch: images per forward pass.
        rereads: whether a step's images are needed more than once.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rereads: bool


@dataclass(frozen=True)
class Data:
    """The data set and its augmentation."""

    dataset: str = "digits"
    """One of the names above, or path/to/file.py:function."""
    data_dir: str = "data"
    """Folder with CIFAR or ImageNet (archives or unpacked), other photographs, or packs."""
    download: bool = False
    """Download the official archive if it is not in data_dir."""
    train_images: int | None = None
    """Train on the first N images of a fixed shuffle; None: all."""
    synthetic_images: int = 10_000
    """Size of the synthetic training set."""
    synthetic_pixels: int = 32
    """Height and width of synthetic images."""
    crop: int = 0
    """Padding in pixels of the random crop; 0 for none."""
    crop_padding: Literal["zeros", "reflect"] = "zeros"
    """Padding of the random crop."""
    flip: bool = False
    """Random horizontal flip, p = 0.5."""
    flip_rule: Literal["random", "alternating"] = "random"
    """random draws a flip for each image and epoch; alternating flips each image in every second epoch."""
    cutout: int = 0
    """Side in pixels of cutout's square; 0 for none."""
    pixels: int = 224
    """Side in pixels of training images, random resized crops (photographs)."""
    crop_scale: float = 0.08
    """Smallest fraction of the area that a random crop covers (photographs)."""
    eval_pixels: int = 224
    """Side in pixels of evaluation images, centre crops (photographs)."""
    eval_resize: int | None = None
    """Length of the short side before that centre crop; None: eval_pixels · 256/224."""
    policy: Literal["none", "autoaugment", "randaugment"] = "none"
    """Policy after crop and flip (photographs)."""
    mixup: float = 0.0
    """α of mixup's Beta distribution; 0 for none (photographs)."""
    erasing: float = 0.0
    """Probability of random erasing (photographs)."""
    reader: Literal["native", "dali"] = "native"
    """Decode and resize photographs natively or with NVIDIA DALI (extra dali; on the run's GPU, if any)."""
    workers: int = 0
    """Processes (or DALI threads) that read photographs; the number does not change the images."""
    keep_gb: float = 1.0
    """Memory per process in GB to cache images that the method needs again; the rest are read again."""

    @property
    def source(self) -> Source:
        """What is known of the data set from its name; nothing for a user-defined one."""
        return DATASETS.get(self.dataset, OWN)

    def check(self) -> None:
        """Raise ``ValueError`` at the first invalid value or combination."""
        own = is_file_reference(self.dataset)
        if not own and self.dataset not in DATASETS:
            raise unknown("dataset", self.dataset, DATASETS)
        require_ranges(
            self,
            train_images=COUNT,
            synthetic_images=COUNT,
            synthetic_pixels=COUNT,
            crop=COUNT_OR_0,
            cutout=COUNT_OR_0,
            pixels=COUNT,
            crop_scale=(lambda share: 0 < share <= 1, "above 0, up to 1"),
            eval_pixels=COUNT,
            eval_resize=(lambda side: side >= self.eval_pixels, f"at least eval_pixels, {self.eval_pixels}"),
            mixup=FROM_0,
            erasing=SHARE,
            workers=COUNT_OR_0,
            keep_gb=FROM_0,
        )
        if not own:
            self.check_augmentation(self.source.photographs)
        if self.flip_rule != "random" and not self.flip:
            raise ValueError(f"flip_rule is {self.flip_rule!r}; allowed without flip: 'random'")
        if self.reader == "dali" and self.policy != "none":
            raise ValueError(
                f"policy is {self.policy!r}; allowed with reader 'dali': 'none', as DALI has its own random policies; "
                "use reader 'native'"
            )

    def check_augmentation(self, photographs: bool) -> None:
        """Raise ``ValueError`` for augmentation options that do not apply to this kind of images."""
        others = {"policy": "none", "mixup": 0.0, "erasing": 0.0, "reader": "native"}
        if photographs:
            others = {"crop": 0, "crop_padding": "zeros", "flip_rule": "random", "cutout": 0}
        for name, idle in others.items():
            value = getattr(self, name)
            if value != idle:
                raise ValueError(f"{name} is {value!r}; allowed with dataset {self.dataset}: {idle!r}")


Data.__doc__ = f"{Data.__doc__}\n\n{described('Data sets', DATASETS)}"
