"""SAM: python -m conadv_lab.train digits-vanilla --method docs/examples/sam.py:sam"""

import torch

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.steps import total, train_on
from conadv_lab.models.norm import one_update


class SAM(Method):
    label, colour, marker = "my SAM", "#56B4E9", "h"
    side = "ascent"  # another gradient, before the step's: cost 2 and depth 2 follow

    def __init__(self, rho):
        self.rho = rho

    def gradient(self, model, step, criterion):
        with one_update(model):
            with self.gradients.summed():
                loss = self.run(model, step, criterion, counted=True)
            weights = [p for p in model.parameters() if p.grad is not None]
            with torch.no_grad():
                kept = torch._foreach_mul(weights, 1)
                length = torch.stack([p.grad.norm() for p in weights]).norm()
                for p in weights:
                    p += self.rho / length * p.grad
                    p.grad = None
            self.run(model, step, criterion, counted=False)
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)
        return Losses(loss)

    def run(self, model, step, criterion, counted):
        batches = step.batches()
        return total(train_on(model, b.images, b, criterion, 1.0, "main", counted=counted) for b in batches)


def sam(config):
    return SAM(rho=0.05)
