"""One rank of a loop with DistributedDataParallel: ``python -m tests.integrations.ddp_five BATCHES OUT``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import conadv_lab as cl
from conadv_lab.models.norm import share_statistics
from tests.integrations.five_steps import STEPS, converted, method, optimizer


def main() -> None:
    dist.init_process_group("gloo")
    batches = torch.load(sys.argv[1], weights_only=True)
    model, ours = converted(), method()
    share_statistics(model, dist.group.WORLD)
    network = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    optimizing, criterion = optimizer(model), nn.CrossEntropyLoss()
    own = batches[dist.get_rank() :: dist.get_world_size()]  # each rank one group of every global batch
    for step in cl.lookahead(own, steps=STEPS, ahead=ours.lookahead):
        ours.backward(network, step, criterion)
        optimizing.step()
        optimizing.zero_grad()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), Path(sys.argv[2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
