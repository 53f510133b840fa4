"""LAMB: layer-wise adaptive moments (You et al., ICLR 2020, arXiv 1904.00962)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conadv_lab.mistakes import require
from conadv_lab.optim.options import Optimization
from conadv_lab.optim.tensors import add_scaled_, norms, require_fit, require_ordinary, shards, with_gradients


class LAMB(Optimizer):
    """Adam whose step in each tensor is scaled to the norm of the weight (Algorithm 2, with φ(z) = z).

    With g the gradient and d the weight decay, at step t for each tensor

        m ← β₁ m + (1 − β₁) g        m̂ = m / (1 − β₁ᵗ)
        v ← β₂ v + (1 − β₂) g²       v̂ = v / (1 − β₂ᵗ)
        u = m̂ / (√v̂ + eps) + d w     w ← w − lr λ u,  λ = ‖w‖ / ‖u‖

    λ is 1 where ‖w‖ = 0 or ‖u‖ = 0, so a tensor that starts at zero learns. Groups with ``adapt=False``
    (batch norm, biases: see ``parameter_groups``) take λ = 1, that is Adam, and no weight decay unless the
    group sets one. Never synchronises. Gradients are only read.
    With weights sharded by `torch.distributed.fsdp.fully_shard`, each rank updates its own shard using norms of the
    whole tensors.

    Args:
        params: tensors or groups, as for every torch optimiser; a group may set any argument below.
        lr: learning rate, at least 0; a group's ``lr`` may change at every step, and may be a 0-d tensor.
        betas: (β₁, β₂), both in [0, 1).
        eps: added to the root, above 0.
        weight_decay: d, at least 0.

    Raises:
        ValueError: an argument outside its range, a complex parameter, or a sparse gradient.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
    >>> weight.grad = torch.tensor([0.0, 100.0])  # its norm does not matter
    >>> optimizer.step()
    >>> weight.data  # one step of 0.1 × 5
    tensor([3.0000, 3.5000])
    """

    tensor_lr = True

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a checked group; without adaptation its weight decay is 0 unless it sets one."""
        if not param_group.get("adapt", True):
            param_group.setdefault("weight_decay", 0.0)
        group = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            require(group[name] >= 0, name, group[name], "a number of at least 0")
        require(group["eps"] > 0, "eps", group["eps"], "a number above 0")
        require(all(0 <= beta < 1 for beta in group["betas"]), "betas", group["betas"], "numbers in [0, 1)")
        super().add_param_group(param_group)
        require_ordinary(self, self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but a state that does not fit is rejected here instead of at the next step."""
        require_fit(self, state_dict)
        super().load_state_dict(state_dict)
        shared: dict[tuple[float, torch.device], Tensor] = {}
        for param, state in self.state.items():
            count = torch.as_tensor(float(state["step"]), dtype=torch.float64, device=param.device)
            state["step"] = shared.setdefault((float(state["step"]), param.device), count)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; a closure runs first, with gradients enabled, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        counted: set[int] = set()
        for group in self.param_groups:
            for params, grads in with_gradients(group["params"]):
                states = self._moments(params, counted)
                own = shards(params)
                updates = _updates(group, own, shards(grads), states)
                if group["adapt"]:
                    weight, update = norms(own, params), norms(updates, params)
                    ratio = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
                    torch._foreach_addcmul_(own, updates, ratio.mul_(-group["lr"]).unbind())
                else:
                    add_scaled_(own, updates, -group["lr"])
        return loss

    def _moments(self, params: list[Tensor], counted: set[int]) -> list[dict[str, Any]]:
        """States of parameters in a step; increments counts that are not yet in ``counted``.

        Parameters that start together share their count, so that there are few of them to multiply with.
        """
        states = [self.state[param] for param in params]
        begun = torch.zeros((), dtype=torch.float64, device=params[0].device)
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = begun
                state["mean"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["square"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if id(state["step"]) not in counted:
                counted.add(id(state["step"]))
                state["step"].add_(1)
        return states


def _updates(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
) -> list[Tensor]:
    """Update the moments and return u for each parameter."""
    beta_mean, beta_square = group["betas"]
    means, squares = (shards([state[name] for state in states]) for name in ("mean", "square"))
    torch._foreach_lerp_(means, grads, 1 - beta_mean)
    torch._foreach_mul_(squares, beta_square)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta_square)
    # In float64, like Python numbers; one tensor for all that started together.
    steps = {id(state["step"]): state["step"] for state in states}
    of_square, of_mean = (
        {key: 1 - beta**count for key, count in steps.items()} for beta in (beta_square, beta_mean)
    )
    updates = torch._foreach_div(squares, [of_square[id(state["step"])] for state in states])
    torch._foreach_sqrt_(updates)
    torch._foreach_add_(updates, group["eps"])
    torch._foreach_mul_(updates, [of_mean[id(state["step"])] for state in states])
    updates = torch._foreach_div(means, updates)
    if group["weight_decay"]:
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
    return list(updates)


def build_lamb(section: Optimization, groups: list[dict[str, Any]]) -> LAMB:
    """Build it from a config's section."""
    assert section.lr is not None, "the config is not resolved"
    return LAMB(groups, lr=section.lr, weight_decay=section.weight_decay)
