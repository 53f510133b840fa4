"""The config's section of the model, and every model by its name. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

from conadv_lab.mistakes import BELOW_1, FROM_0, require_ranges, unknown
from conadv_lab.references import is_file_reference
from conadv_lab.registry import Entry, described

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Of torch.compile: those that replay the network from CUDA graphs."""
TIMM = "timm:"
"""What the names of timm's models begin with."""


@dataclass(frozen=True)
class Network(Entry):
    """A model by its name; its function makes a module of the number of classes.

    Attributes:
        reads: fields of the section that the function takes too, by their names.
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
"""Every model by its name; a new one is a file with its function, and a line here."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    model: str = "digits-cnn"
    """One of those above, timm:NAME, or path/to/file.py:function."""
    last_gamma: float = 0.0
    """γ that the last batch norm of each residual block begins with: 0 (Goyal et al. 2017), or 1 as in torchvision."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 is autocast, with weights in float32."""
    channels_last: bool = False
    """Memory layout NHWC, faster for convolutions on most devices."""
    compile: bool = False
    """torch.compile the network."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """torch.compile's own; reduce-overhead and max-autotune replay it from CUDA graphs, for few images a device."""
    ema: float = 0.0
    """Decay of an exponential average of the weights that is evaluated instead of them; 0 for none."""

    def check(self) -> None:
        """Raise ``ValueError`` at the first value or combination that cannot work."""
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
