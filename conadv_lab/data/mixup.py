"""mixup (Zhang et al. 2018, arXiv 1710.09412) as a pure function of each image's key."""

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn.functional import one_hot

from conadv_lab.data.hashing import uniform


def mixup_weights(keys: Tensor, alpha: float) -> Tensor:
    """λ of each image, from Beta(α, α): (B,) int32 keys to (B,) float32, both on the host.

    torchvision draws one λ per batch; here every image has its own, so that the split into micro-batches does not
    matter.
    """
    draws = uniform(keys, 1)[:, 0].double().numpy()
    return torch.from_numpy(betaincinv(alpha, alpha, draws)).float()


def mixed(images: Tensor, labels: Tensor, weights: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Images 1 … m of 0 … m, each mixed with the one before it: λ x_i + (1 − λ) x_{i−1}, labels likewise.

    Args:
        images: (m + 1, C, H, W) float.
        labels: (m + 1,) int64.
        weights: (m,) λ, from the second image on.
        classes: number of classes.

    Returns:
        (m, C, H, W) images and (m, classes) probabilities.

    >>> images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0, 1])
    >>> x, y = mixed(images, labels, torch.tensor([0.75]), classes=2)
    >>> x.item(), y.tolist()
    (0.75, [[0.25, 0.75]])
    """
    share = weights.view(-1, 1, 1, 1).to(images.dtype)
    both = images[1:] * share + images[:-1] * (1 - share)
    targets = one_hot(labels, classes).to(images.dtype)
    return both, targets[1:] * share.flatten(1) + targets[:-1] * (1 - share).flatten(1)
