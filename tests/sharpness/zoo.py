"""Every layer and every loss of torch.nn that is a mean, in small float64 networks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

N = 6


class Net(nn.Module):
    """A layer between weights of its inputs and fixed mixtures of its outputs, so that both sides are curved."""

    def __init__(self, layer: nn.Module, inputs: Tensor, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.call = call or (lambda layer, x: layer(x))
        if inputs.is_floating_point():
            self.scale = nn.Parameter(torch.linspace(0.8, 1.3, inputs.shape[-1]))
            self.shift = nn.Parameter(torch.linspace(-0.2, 0.1, inputs.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x * self.scale + self.shift
        out = self.call(self.layer, x).flatten(1)
        places = torch.arange(out.shape[1] * 3, dtype=out.dtype).view(-1, 3)
        return out @ (1.7 * places + 0.5).cos() / out.shape[1] ** 0.5


def first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def with_itself(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x.tanh())


def unpooled(layer: nn.Module, x: Tensor) -> Tensor:
    pool = getattr(F, f"max_pool{layer.kernel_size.__len__()}d")  # type: ignore[arg-type]
    return layer(*pool(x, 2, return_indices=True))


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0]


Entry = tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor] | None]
L1, L2, L3 = (N, 2, 6), (N, 2, 4, 4), (N, 2, 4, 4, 4)

WEIGHTED: dict[str, Entry] = {
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]), (N, 4), lambda layer, x: layer.log_prob(x)
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (N, 4), None),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), L2, None),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), L3, None),
    "Bilinear": (lambda: nn.Bilinear(3, 3, 4), (N, 3), with_itself),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3), L1, None),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), L2, None),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2), L3, None),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), L1, None),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), L2, None),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), L3, None),
    "Embedding": (lambda: nn.Embedding(7, 4, max_norm=None), (N, 3), None),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4, mode="sum"), (N, 3), None),
    "GRU": (lambda: nn.GRU(2, 2, batch_first=True), (N, 3, 2), first),
    "GRUCell": (lambda: nn.GRUCell(3, 3), (N, 3), None),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (N, 4, 3), None),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), L1, None),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, affine=True), L2, None),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), L3, None),
    "LSTM": (lambda: nn.LSTM(2, 2, batch_first=True), (N, 3, 2), first),
    "LSTMCell": (lambda: nn.LSTMCell(3, 3), (N, 3), first),
    "LayerNorm": (lambda: nn.LayerNorm(4), (N, 3, 4), None),
    "Linear": (lambda: nn.Linear(4, 5), (N, 4), None),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (N, 2, 4), attended),
    "PReLU": (lambda: nn.PReLU(2), L1, None),
    "RMSNorm": (lambda: nn.RMSNorm(4), (N, 3, 4), None),
    "RNN": (lambda: nn.RNN(2, 2, batch_first=True), (N, 3, 2), first),
    "RNNCell": (lambda: nn.RNNCell(3, 3), (N, 3), None),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(2), L2, None),
    "Transformer": (
        lambda: nn.Transformer(2, 1, 1, 1, 2, dropout=0.1, batch_first=True), (N, 3, 2), with_itself
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(2, 1, 2, batch_first=True), 1),
        (N, 3, 2), with_itself,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(2, 1, 2, batch_first=True), (N, 3, 2), with_itself
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 2, batch_first=True), 1),
        (N, 3, 2), None,
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(2, 1, 2, batch_first=True), (N, 3, 2), None
    ),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (N, 4), None),
    "weight_norm of the last axis": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), (N, 4), None
    ),
    "weight_norm of the whole": (
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 3), dim=None), L1, None
    ),
    "weight_norm of a middle axis": (
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 2, 2), dim=1), L2, None
    ),
    "weight_norm, the old one": (lambda: old_weight_norm(nn.Linear(4, 3)), (N, 4), None),
    "weight_norm, the old one, of a convolution": (
        lambda: old_weight_norm(nn.ConvTranspose1d(2, 2, 2)), L1, None
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (N, 4), None),
    "spectral_norm, the old one": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), (N, 4), None),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (N, 3), None),
}  # fmt: skip
"""Every layer that has weights, and those whose weights are computed."""

PLAIN: dict[str, Entry] = {
    **{
        name: (getattr(nn, name), (N, 4), None)
        for name in (
            "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU",
            "LogSigmoid", "Mish", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink",
            "Softsign", "Tanh", "Tanhshrink", "GLU", "Dropout", "AlphaDropout", "Flatten",
        )
    },
    **{
        name: (partial(getattr(nn, name), -1), (N, 4), None)
        for name in ("LogSoftmax", "Softmax", "Softmin")
    },
    "Threshold": (lambda: nn.Threshold(0.1, -2.0), (N, 4), None),
    "Softmax2d": (nn.Softmax2d, L2, None),
    "CosineSimilarity": (lambda: nn.CosineSimilarity(1), L1, with_itself),
    "PairwiseDistance": (lambda: nn.PairwiseDistance(2), (N, 4), lambda d, x: d(x, x.sin())[:, None]),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), L1, None),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), L2, None),
    "LPPool3d": (lambda: nn.LPPool3d(2, 2), L3, None),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), L2, None),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), L2, None),
    **{
        f"{kind}{axes}d": (partial(getattr(nn, f"{kind}{axes}d"), 2), (L1, L2, L3)[axes - 1], None)
        for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "MaxPool") for axes in (1, 2, 3)
    },
    "FractionalMaxPool2d": (
        lambda: nn.FractionalMaxPool2d(2, output_size=2, _random_samples=torch.full((2 * N, 2, 2), 0.4).double()),
        L2, None,
    ),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), L2, None),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), L2, None),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (N, 4, 2, 2), None),
    "Unfold": (lambda: nn.Unfold(2), L2, None),
    "Fold": (lambda: nn.Fold((3, 3), 2), (N, 4, 4), None),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), L2, None),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), L3, None),
    "CircularPad2d": (lambda: nn.CircularPad2d(1), L2, None),
}  # fmt: skip
"""Layers without weights, which pass derivatives on to those of their inputs."""


def old_weight_norm(layer: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def subject(entry: Entry) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape, call = entry
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    layer = make()
    embeds = isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    x = (
        torch.randint(0, 7, shape, generator=generator)
        if embeds
        else torch.randn(shape, generator=generator, dtype=torch.float64)
    )
    for name, buffer in layer.named_buffers():
        if name == "running_var":
            buffer.uniform_(0.5, 2, generator=generator)
    return Net(layer, x, call).double(), x, torch.arange(N) % 3


def small(last: nn.Module | None = None, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)]
    return nn.Sequential(*layers, *([last] if last else [])).double()


def real(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


LABELS = torch.arange(N) % 3
SIGNS = 2.0 * (torch.arange(N) % 2).double() - 1
LOSSES: dict[str, tuple[nn.Module, Any, Any]] = {
    "BCELoss": (small(nn.Sigmoid()), nn.BCELoss(), real(N, 3).sigmoid()),
    "BCEWithLogitsLoss": (small(), nn.BCEWithLogitsLoss(), real(N, 3).sigmoid()),
    "BCEWithLogitsLoss, weighted": (
        small(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2, 3]).double()), real(N, 3).sigmoid()
    ),
    "CTCLoss": (
        nn.Sequential(small(outputs=12), nn.Unflatten(1, (4, 3)), nn.LogSoftmax(2)),
        lambda f, y: nn.CTCLoss()(f.transpose(0, 1), y, torch.full((len(y),), 4), torch.full((len(y),), 2)),
        1 + (torch.arange(2 * N) % 2).view(N, 2),
    ),
    "CosineEmbeddingLoss": (
        small(outputs=6), lambda f, y: nn.CosineEmbeddingLoss(margin=-0.5)(f[:, :3], f[:, 3:], y), SIGNS
    ),
    "CrossEntropyLoss": (small(), nn.CrossEntropyLoss(), LABELS),
    "CrossEntropyLoss, smoothed": (small(), nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "CrossEntropyLoss, weighted": (
        small(), nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]).double(), label_smoothing=0.1), LABELS
    ),
    "CrossEntropyLoss of probabilities": (small(), nn.CrossEntropyLoss(), real(N, 3).softmax(1)),
    "GaussianNLLLoss": (
        small(outputs=4), lambda f, y: nn.GaussianNLLLoss()(f[:, :2], y, f[:, 2:].exp()), real(N, 2)
    ),
    "HingeEmbeddingLoss": (small(), nn.HingeEmbeddingLoss(2.0), SIGNS[:, None].expand(N, 3)),
    "HuberLoss": (small(), nn.HuberLoss(delta=0.5), real(N, 3)),
    "KLDivLoss": (small(nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean"), real(N, 3).softmax(1)),
    "KLDivLoss over elements": (small(nn.LogSoftmax(1)), nn.KLDivLoss(), real(N, 3).softmax(1)),
    "L1Loss": (small(), nn.L1Loss(), real(N, 3)),
    "MSELoss": (small(), nn.MSELoss(), real(N, 3)),
    "MarginRankingLoss": (
        small(outputs=2), lambda f, y: nn.MarginRankingLoss(1.0)(f[:, 0], f[:, 1], y), SIGNS
    ),
    "MultiLabelMarginLoss": (
        small(), nn.MultiLabelMarginLoss(), torch.stack([LABELS, -torch.ones_like(LABELS), LABELS], 1)
    ),
    "MultiLabelSoftMarginLoss": (small(), nn.MultiLabelSoftMarginLoss(), (real(N, 3) > 0).double()),
    "MultiMarginLoss": (small(), nn.MultiMarginLoss(p=2), LABELS),
    "NLLLoss": (small(nn.LogSoftmax(1)), nn.NLLLoss(), LABELS),
    "NLLLoss2d": (
        nn.Sequential(small(outputs=12), nn.Unflatten(1, (3, 2, 2)), nn.LogSoftmax(1)), nn.NLLLoss(),
        (torch.arange(4 * N) % 3).view(N, 2, 2),
    ),
    "PoissonNLLLoss": (small(), nn.PoissonNLLLoss(), real(N, 3).exp().round()),
    "SmoothL1Loss": (small(), nn.SmoothL1Loss(beta=0.3), real(N, 3)),
    "SoftMarginLoss": (small(), nn.SoftMarginLoss(), SIGNS[:, None].expand(N, 3)),
    "TripletMarginLoss": (
        small(outputs=6), lambda f, y: nn.TripletMarginLoss()(f[:, :2], f[:, 2:4], f[:, 4:]), LABELS
    ),
    "TripletMarginWithDistanceLoss": (
        small(outputs=6),
        lambda f, y: nn.TripletMarginWithDistanceLoss()(f[:, :2], f[:, 2:4], f[:, 4:]), LABELS,
    ),
}  # fmt: skip
if hasattr(nn, "LinearCrossEntropyLoss"):
    torch.manual_seed(0)
    LOSSES["LinearCrossEntropyLoss"] = (small(), nn.LinearCrossEntropyLoss(3, 4).double(), LABELS)
"""Every loss whose default is a mean, and their options that change the mean."""


REFUSED = {
    "CrossMapLRN2d": "no second derivative of functions with out",
    "MultiLabelMarginLoss": "no second derivative of multilabel_margin_loss",
    "MultiMarginLoss": "no second derivative of multi_margin_loss",
}
"""What torch cannot differentiate twice."""
