"""The peer of a captured step: a plain PyTorch loop, written by hand, in one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM = 3


def captured_loop(
    model: nn.Module,
    batch: int,
    images: Tensor,
    labels: Tensor,
    lr: float,
    momentum: float,
    decay: float,
    steps: int,
) -> Callable[[], None]:
    """A step of the plain loop of `benchmarks.step`, captured: fixed inputs, bfloat16 autocast, fused SGD, cosine."""
    criterion = nn.CrossEntropyLoss()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    rate = torch.full((), lr, device=images.device)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    x = torch.empty(batch, *images.shape[1:], device=images.device)
    y = torch.empty(batch, dtype=labels.dtype, device=labels.device)

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()

    def fill() -> None:
        chosen = torch.randint(len(labels), (batch,), device=labels.device)
        x.copy_(images[chosen]).div_(255)
        y.copy_(labels[chosen])

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    fill()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        work()

    def step() -> None:
        fill()
        graph.replay()
        scheduler.step()

    return step
