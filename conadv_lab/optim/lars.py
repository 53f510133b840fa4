"""LARS: layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888) in three variants."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conadv_lab.mistakes import require, unknown
from conadv_lab.optim.options import Optimization
from conadv_lab.optim.tensors import (
    add_scaled_,
    blocks,
    norms,
    require_fit,
    require_ordinary,
    shards,
    with_gradients,
)


class LARS(Optimizer):
    """Momentum SGD whose step in each tensor is scaled by the trust ratio λ of weight and gradient norms.

    With g the gradient, m the momentum, d the weight decay and η the trust coefficient, for each tensor

        λ = η ‖w‖ / (‖g‖ + d ‖w‖ + eps), and 1 where ‖w‖ = 0 or ‖g‖ = 0

        A   v ← m v + lr λ (g + d w)    w ← w − v         You et al. 2017 (Algorithm 1); MLPerf's reference
        B   v ← m v + λ (g + d w)       w ← w − lr v      most PyTorch ports; MLPerf's winners, to rounding
        C   v ← m v + g + d w           w ← w − lr λ v    NUS-HPC-AI; λ at most ``clamp``

    A, B and C are the same while lr and λ are constant, and differ as soon as they change. The velocity v starts at
    zero. A zero weight or a zero gradient gives λ = 1, that is plain momentum SGD: a tensor that starts at zero
    learns. Without weight decay the first step has length lr η ‖w‖.

    Groups with ``adapt=False`` (batch norm, biases: see ``parameter_groups``) take λ = 1 and no weight decay
    unless the group sets one. Never synchronises: λ stays a tensor on the device. Gradients are only read.
    With weights sharded by `torch.distributed.fsdp.fully_shard`, each rank updates its own shard using norms of the
    whole tensors.

    Args:
        params: tensors or groups, as for every torch optimiser; a group may set any argument below.
        lr: learning rate, at least 0; a group's ``lr`` may change at every step, and may be a 0-d tensor.
        momentum: m, in [0, 1).
        weight_decay: d, at least 0.
        trust_coefficient: η, above 0.
        variant: "A", "B" or "C".
        eps: added to the ratio's denominator, at least 0.
        clamp: the largest λ of variant C, above 0; A and B have no limit.

    Raises:
        ValueError: an argument outside its range, an unknown variant, a complex parameter, or a sparse gradient.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = LARS([weight], lr=2.0, weight_decay=0.0)
    >>> weight.grad = torch.tensor([0.0, 100.0])  # its norm does not matter
    >>> optimizer.step()
    >>> weight.data  # one step of 2 × 0.001 × 5
    tensor([3.0000, 3.9900])
    """

    tensor_lr = True

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 0.001,
        variant: str = "B",
        eps: float = 1e-8,
        clamp: float = 50.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "eps": eps,
            "clamp": clamp,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a checked group; without adaptation its weight decay is 0 unless it sets one."""
        if not param_group.get("adapt", True):
            param_group.setdefault("weight_decay", 0.0)
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        require_ordinary(self, self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but a state that does not fit is rejected here instead of at the next step."""
        require_fit(self, state_dict)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; a closure runs first, with gradients enabled, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params, grads in with_gradients(group["params"]):
                velocities = [self._velocity(param) for param in params]
                own = [shards(tensors) for tensors in (params, grads, velocities)]
                if group["adapt"]:
                    factors = _factors(group, norms(own[0], params), norms(own[1], params))
                    for cut in blocks(factors, *own):
                        _adaptive_step(group, *cut)
                else:
                    _plain_step(group, *own)
        return loss

    def _velocity(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state["velocity"]


def _check(group: dict[str, Any]) -> None:
    if group["variant"] not in ("A", "B", "C"):
        raise unknown("LARS variant", str(group["variant"]), ("A", "B", "C"))
    for name in ("lr", "weight_decay", "eps"):
        require(group[name] >= 0, name, group[name], "a number of at least 0")
    for name in ("trust_coefficient", "clamp"):
        require(group[name] > 0, name, group[name], "a number above 0")
    require(0 <= group["momentum"] < 1, "momentum", group["momentum"], "a number in [0, 1)")


def _factors(group: dict[str, Any], weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """One 0-d tensor per parameter: the factor of g + d w (A: lr λ, B: λ) or of the velocity (C: −lr λ)."""
    ratio = group["trust_coefficient"] * weight / (gradient + group["weight_decay"] * weight + group["eps"])
    if group["variant"] == "C":
        ratio.clamp_(max=group["clamp"])
    ratio = torch.where((weight > 0) & (gradient > 0), ratio, 1.0)
    return ratio.mul_({"A": group["lr"], "B": 1.0, "C": -group["lr"]}[group["variant"]]).unbind()


def _adaptive_step(group: dict[str, Any], factors: Any, params: Any, grads: Any, velocities: Any) -> None:
    decay = group["weight_decay"]
    pull = torch._foreach_add(grads, params, alpha=decay) if decay else grads
    torch._foreach_mul_(velocities, group["momentum"])
    if group["variant"] == "C":
        torch._foreach_add_(velocities, pull)
        torch._foreach_addcmul_(params, velocities, factors)
    else:
        torch._foreach_addcmul_(velocities, pull, factors)
        add_scaled_(params, velocities, -1.0 if group["variant"] == "A" else -group["lr"])


def _plain_step(group: dict[str, Any], params: Any, grads: Any, velocities: Any) -> None:
    into_velocity = group["lr"] if group["variant"] == "A" else 1.0
    decay = group["weight_decay"]
    pull = torch._foreach_add(grads, params, alpha=decay) if decay else grads
    torch._foreach_mul_(velocities, group["momentum"])
    add_scaled_(velocities, pull, into_velocity)
    add_scaled_(params, velocities, -1.0 if group["variant"] == "A" else -group["lr"])


def build_lars(section: Optimization, groups: list[dict[str, Any]]) -> LARS:
    """Build it from a config's section."""
    assert section.lr is not None, "the config is not resolved"
    return LARS(
        groups,
        lr=section.lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        trust_coefficient=section.trust_coefficient,
        variant=section.lars_variant,
    )
