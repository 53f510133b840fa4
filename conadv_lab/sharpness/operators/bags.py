"""EmbeddingBag and CTC loss from operations that can be differentiated twice, unlike PyTorch's own."""

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag``: rows of ``weight``, summed, averaged or their maximum, bag by bag."""
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError("EmbeddingBag has max_norm or scale_grad_by_freq; allowed when measuring: neither")
    if input.ndim == 2:
        bag = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        count, input = len(input), input.reshape(-1)
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        count = len(starts)
        places = torch.arange(len(input), device=input.device)
        bag = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    if padding_idx is not None:
        kept = input != padding_idx % len(weight)
        input, bag = input[kept], bag[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    empty = rows.new_zeros(count, weight.shape[1])
    if mode == "max":
        return _highest(rows, bag, empty)
    summed = empty.index_add(0, bag, rows)
    if mode == "sum":
        return summed
    sizes = torch.zeros(count, dtype=rows.dtype, device=rows.device)
    return summed / sizes.index_add(0, bag, torch.ones_like(bag, dtype=rows.dtype)).clamp_min(1)[:, None]


def _highest(rows: Tensor, bag: Tensor, empty: Tensor) -> Tensor:
    """The maximum of each bag, 0 if empty; gathered by index, so that only the row of the maximum has a gradient."""
    made = []
    for number in range(len(empty)):
        mine = rows[bag == number]
        made.append(mine.gather(0, mine.detach().argmax(0, keepdim=True))[0] if len(mine) else empty[number])
    return torch.stack(made)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | tuple[int, ...],
    target_lengths: Tensor | tuple[int, ...],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``F.ctc_loss``: −log of the sum over alignments, by the forward recursion (Graves et al. 2006, eqs. 5 to 8)."""
    single = log_probs.ndim == 2
    if single:
        log_probs = log_probs[:, None]
    lengths = torch.as_tensor(input_lengths, device=log_probs.device).reshape(-1).tolist()
    sizes = torch.as_tensor(target_lengths, device=log_probs.device).reshape(-1).tolist()
    rows = targets.split(sizes) if targets.ndim == 1 else [t[:s] for t, s in zip(targets, sizes, strict=True)]
    losses = torch.stack([
        _of_one(log_probs[:length, n], labels.long().to(log_probs.device), blank)
        for n, (length, labels) in enumerate(zip(lengths, rows, strict=True))
    ])  # fmt: skip
    if zero_infinity:
        losses = torch.where(torch.isinf(losses.detach()), torch.zeros_like(losses), losses)
    if reduction == "mean":
        return (losses / torch.tensor(sizes, device=losses.device).clamp_min(1).to(losses.dtype)).mean()
    if reduction == "sum":
        return losses.sum()
    return losses[0] if single else losses


def _of_one(log_probs: Tensor, labels: Tensor, blank: int) -> Tensor:
    """−log p(labels) of one sequence of shape (time, classes)."""
    extended = torch.full((2 * len(labels) + 1,), blank, device=labels.device, dtype=torch.int64)
    extended[1::2] = labels
    emitted = log_probs[:, extended]
    never = torch.finfo(log_probs.dtype).min / 4  # not −∞, whose derivative is NaN
    skips = torch.zeros_like(extended, dtype=torch.bool)
    skips[2:] = (extended[2:] != blank) & (extended[2:] != extended[:-2])
    start = torch.arange(len(extended), device=labels.device) < 2
    alpha = torch.where(start, emitted[0], never)
    for step in emitted[1:]:
        before = F.pad(alpha[:-1], (1, 0), value=never)
        skipped = torch.where(skips, F.pad(alpha, (2, 0), value=never)[: len(alpha)], never)
        alpha = step + torch.stack([alpha, before, skipped]).logsumexp(0)
    total = -alpha[-2:].logsumexp(0)
    return torch.where(total.detach() > -never / 2, torch.full_like(total, torch.inf), total)
