"""The config's model section, and every model by name. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

from conadv_lab.mistakes import BELOW_1, FROM_0, require_ranges, unknown
from conadv_lab.references import is_file_reference
from conadv_lab.registry import Entry, described

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that replay the network from CUDA graphs."""
TIMM = "timm:"
"""Prefix of timm's models."""


@dataclass(frozen=True)
class Network(Entry):
    """A named model; its function makes a module from the number of classes.

    Attributes:
        reads: fields of the section that the function also takes, by name.
    """

    reads: tuple[str, ...] = ()


_ROOM = "conadv_lab.models"
MODELS = {
    "digits-cnn": Network("six convolutions, for 8x8 digits", f"{_ROOM}.digits:DigitsCNN"),
    "fast-cnn": Network("CIFAR-10 in seconds on a GPU", f"{_ROOM}.fast:fast_cnn"),
    "fast-cnn-small": Network("CIFAR-10 in minutes on a CPU", f"{_ROOM}.fast:fast_cnn_small"),
    "resnet18": Network("ResNet-18 for 32x32 images", f"{_ROOM}.resnet:resnet18", ("last_gamma",)),
    "resnet20": Network("ResNet-20 for 32x32 images", f"{_ROOM}.resnet:resnet20", ("last_gamma",)),
    "resnet50": Network("ResNet-50 v1.5 for photographs", f"{_ROOM}.resnet:resnet50", ("last_gamma",)),
    "nf-resnet20": Network("without normalisation, for 32x32 images", f"{_ROOM}.nf_resnet:nf_resnet20"),
    "nf-resnet26": Network("timm's nf_resnet26, without normalisation", f"{_ROOM}.nf_resnet:nf_resnet26"),
    "nf-resnet50": Network("timm's nf_resnet50, without normalisation", f"{_ROOM}.nf_resnet:nf_resnet50"),
}
"""Every model by name; a new one is a file with its function and a line here."""


@dataclass(frozen=True)
class Model:
    """The network."""

    model: str = "digits-cnn"
    """One of the names above, timm:NAME, or path/to/file.py:function."""
    last_gamma: float = 0.0
    """Initial γ of the last batch norm in each residual block: 0 (Goyal et al. 2017), or 1 as in torchvision."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: autocast, with parameters in float32."""
    channels_last: bool = False
    """Memory layout NHWC, faster for convolutions on most devices."""
    compile: bool = False
    """torch.compile the network."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """Mode of torch.compile; reduce-overhead and max-autotune use CUDA graphs, best for few images per device."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then evaluated; 0 for none."""

    def check(self) -> None:
        """Raise ``ValueError`` at the first invalid value or combination."""
        known = MODELS.get(self.model)
        if known is None and not is_file_reference(self.model) and not self.model.startswith(TIMM):
            raise unknown("model", self.model, MODELS)
        require_ranges(self, ema=BELOW_1, last_gamma=FROM_0)
        if self.last_gamma != 0 and (known is None or "last_gamma" not in known.reads):
            able = ", ".join(name for name, known in MODELS.items() if "last_gamma" in known.reads)
            raise ValueError(
                f"last_gamma is {self.last_gamma:g}; allowed for model {self.model}: 0, as only {able} have it"
            )
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"compile_mode is {self.compile_mode!r}; allowed without compile: 'default'")


Model.__doc__ = f"{Model.__doc__}\n\n{described('Models', MODELS)}"
