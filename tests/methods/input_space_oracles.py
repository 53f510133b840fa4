"""The methods in input space, written out from their papers in float64: slow, and without the package's own methods.

A network here is a dictionary of tensors and one formula. Of the package these renderings take the order of the images
and the random numbers of a start, which are data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conadv_lab.data.hashing import image_keys, uniform

LR, MOMENTUM, DECAY, SMOOTHING, EPS = 0.2, 0.9, 1e-3, 0.1, 1e-5
NORMS = ("1", "4")
Group = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images, labels, epochs and indices of one ghost group."""
Value = float | Tensor
"""A number, or a double for each channel, (C, 1, 1)."""
UNIT: tuple[Value, Value] = (0.0, 1.0)


@dataclass
class World:
    """Weights, running statistics and momenta of the small CNN with two batch norms in the place of each."""

    weights: dict[str, Tensor]
    running: dict[str, Tensor]
    momenta: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> "World":
        numbers = {name: value.double().clone() for name, value in state.items() if "num_batches" not in name}
        running = {name: value for name, value in numbers.items() if "running" in name}
        weights = {n: v.requires_grad_() for n, v in numbers.items() if n not in running}
        return cls(weights, running)

    def frozen(self) -> "World":
        """A snapshot: what an attack of this step sees, whatever happens later."""
        weights = {name: value.detach().clone() for name, value in self.weights.items()}
        return World(weights, {name: value.clone() for name, value in self.running.items()}, {}, self.updates)

    def logits(self, x: Tensor, branch: str, seen: list | None = None, running: bool = False) -> Tensor:
        """The network's formula; ``seen`` collects (norm, mean, unbiased variance) of the batch."""
        w = self.weights
        h = F.conv2d(x, w["0.weight"], w["0.bias"], padding=1)
        h = torch.relu(self.normalised(h, "1", branch, seen, running))
        h = F.conv2d(h, w["3.weight"], w["3.bias"], stride=2, padding=1)
        h = torch.relu(self.normalised(h, "4", branch, seen, running))
        return h.flatten(1) @ w["7.weight"].T + w["7.bias"]

    def normalised(self, h: Tensor, norm: str, branch: str, seen: list | None, running: bool) -> Tensor:
        name = f"{norm}.{branch}"
        if running:
            mean, var = self.running[f"{name}.running_mean"], self.running[f"{name}.running_var"]
        else:
            mean = h.mean((0, 2, 3))
            var = ((h - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
            if seen is not None:
                count = h.numel() / h.shape[1]
                seen.append((name, mean.detach(), var.detach() * count / (count - 1)))
        flat = (h - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + EPS).sqrt()
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return flat * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    def gradients(self, loss: Tensor, *leaves: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Of the weights that the loss depends on, and of other leaves, in one backward."""
        found = torch.autograd.grad(loss, [*self.weights.values(), *leaves], allow_unused=True)
        own = zip(self.weights, found[: len(self.weights)], strict=True)
        return {name: g for name, g in own if g is not None}, found[len(self.weights) :]

    def step(self, gradients: dict[str, Tensor]) -> None:
        """SGD with momentum and weight decay, of what has a gradient."""
        for name, gradient in gradients.items():
            weight = self.weights[name].detach()
            wanted = gradient + DECAY * weight
            self.momenta[name] = (
                MOMENTUM * self.momenta[name] + wanted if name in self.momenta else wanted.clone()
            )
            self.weights[name] = (weight - LR * self.momenta[name]).requires_grad_()

    def remember(self, seen: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        """Running statistics move once a step, to the average over the groups of each branch."""
        for name in {name for name, _, _ in seen}:
            groups = [(mean, var) for other, mean, var in seen if other == name]
            for what, values in zip(("mean", "var"), zip(*groups, strict=True), strict=True):
                old = self.running[f"{name}.running_{what}"]
                self.running[f"{name}.running_{what}"] = 0.9 * old + 0.1 * torch.stack(values).mean(0)
        self.updates += any("adversarial" in name for name, _, _ in seen)


def losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """(m,) cross-entropy with label smoothing."""
    log = outputs.log_softmax(1)
    wanted = F.one_hot(labels, outputs.shape[1]).double() * (1 - SMOOTHING) + SMOOTHING / outputs.shape[1]
    return -(wanted * log).sum(1)


def added(one: dict[str, Tensor], other: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    names = [*one, *(name for name in other if name not in one)]
    return {n: one.get(n, torch.tensor(0.0)) + factor * other.get(n, torch.tensor(0.0)) for n in names}


def start_of(group: Group, epsilon: Value, seed: int = 0) -> Tensor:
    keys = image_keys(seed, "start", group[2], group[3])
    draws = uniform(keys, group[0][0].numel()).view(group[0].shape)
    epsilon = epsilon.to(draws.dtype) if isinstance(epsilon, Tensor) else epsilon
    return (draws * (2 * epsilon) - epsilon).double()


def up(gradient: Tensor) -> Tensor:
    return torch.where(gradient >= 0, 1.0, -1.0).double()


def target_of(outputs: Tensor, group: Group, target: str, seed: int = 0) -> Tensor:
    """The class that a targeted attack moves towards: another one at random, or the least likely."""
    if target == "least-likely":
        return outputs.argmin(1)
    classes = outputs.shape[1]
    draws = uniform(image_keys(seed, "target", group[2], group[3]), 1)[:, 0]
    return (group[1] + 1 + (draws * (classes - 1)).long().clamp(max=classes - 2)) % classes


def pgd(
    world: World,
    group: Group,
    count: int,
    epsilon: Value,
    alpha: Value,
    branch: str,
    running: bool,
    target: str,
    bounds: tuple[Value, Value] = UNIT,
) -> Tensor:
    """Madry et al. 2018, towards a target class where one is asked for (Kurakin et al. 2017)."""
    x, labels = group[0], group[1]
    delta, wanted = start_of(group, epsilon), None
    for _ in range(count):
        moved = (x + delta).clamp(*bounds).requires_grad_()
        outputs = world.logits(moved, branch, running=running)
        if target == "true":
            loss = losses(outputs, labels).mean()
        else:
            wanted = target_of(outputs, group, target) if wanted is None else wanted
            loss = -losses(outputs, wanted).mean()
        (gradient,) = torch.autograd.grad(loss, moved)
        delta = (delta + alpha * up(gradient)).clamp(-epsilon, epsilon)
        delta = (x + delta).clamp(*bounds) - x
    return (x + delta).clamp(*bounds)


def advprop(
    world: World, steps: Sequence[Sequence[Group]], tau: int, weights: tuple[float, float], **attack: Any
) -> World:
    """Xie et al. 2020 with weights of τ steps ago: w₁ · mean(clean) + w₂ · mean(adversarial)."""
    past: list[World] = []
    for t, groups in enumerate(steps):
        past.append(world.frozen())
        stale, count = past[max(0, t - tau)], sum(len(group[1]) for group in groups)
        total: dict[str, Tensor] = {}
        seen: list = []
        for group in groups:
            warm = stale.updates >= 10
            images = pgd(stale, group, branch="adversarial", running=warm, **attack)
            for x, branch, weight in ((group[0], "main", weights[0]), (images, "adversarial", weights[1])):
                loss = losses(world.logits(x, branch, seen), group[1]).sum() / count
                total = added(total, world.gradients(weight * loss)[0])
        world.step(total)
        world.remember(seen)
    return world


def fgsm_rs(
    world: World,
    steps: Sequence[Sequence[Group]],
    tau: int,
    epsilon: Value,
    alpha: Value,
    bounds: tuple[Value, Value] = UNIT,
) -> World:
    """Wong et al. 2020: x + clip(u + α · sign ∇) with u uniform, in training mode, adversarial images alone."""
    past: list[World] = []
    for t, groups in enumerate(steps):
        past.append(world.frozen())
        stale, count = past[max(0, t - tau)], sum(len(group[1]) for group in groups)
        total: dict[str, Tensor] = {}
        seen: list = []
        for group in groups:
            images = pgd(stale, group, 1, epsilon, alpha, "main", False, "true", bounds)
            loss = losses(world.logits(images, "main", seen), group[1]).sum() / count
            total = added(total, world.gradients(loss)[0])
        world.step(total)
        world.remember(seen)
    return world


def free_at(
    world: World,
    fresh: Sequence[Sequence[Group]],
    updates: int,
    replays: int,
    epsilon: Value,
    alpha: Value,
    bounds: tuple[Value, Value] = UNIT,
) -> World:
    """Shafahi et al. 2019, algorithm 1: δ of each place in the batch is never reset."""
    first = fresh[0]
    noise = [torch.zeros_like(group[0]) for group in first]
    done = 0
    for groups in fresh:
        count = sum(len(group[1]) for group in groups)
        for _ in range(replays):
            if done == updates:
                return world
            total: dict[str, Tensor] = {}
            seen: list = []
            for place, group in enumerate(groups):
                moved = (group[0] + noise[place]).clamp(*bounds).requires_grad_()
                loss = losses(world.logits(moved, "main", seen), group[1]).sum() / count
                found, (gradient,) = world.gradients(loss, moved)
                total = added(total, found)
                noise[place] = (noise[place] + alpha * up(gradient)).clamp(-epsilon, epsilon)
            world.step(total)
            world.remember(seen)
            done += 1
    return world


def fast_advprop(
    world: World,
    steps: Sequence[Sequence[Group]],
    epsilon: Value,
    alpha: Value,
    bounds: tuple[Value, Value] = UNIT,
) -> World:
    """Mei et al. 2022 by sums over images: weights 1, ½ and ½, each parameter divided by the weights it has seen.

    Every fifth image is one of the others.
    """
    weights = {"clean": 1.0, "attack": 0.5, "adversarial": 0.5}
    for groups in steps:
        total: dict[str, Tensor] = {}
        seen: list = []
        sums = dict.fromkeys(world.weights, 0.0)

        def train(x: Tensor, labels: Tensor, branch: str, weight: float, seen=seen, sums=sums):
            leaf = x.detach().requires_grad_()
            loss = weight * losses(world.logits(leaf, branch, seen), labels).sum()
            found, (by_image,) = world.gradients(loss, leaf)
            for name in found:
                sums[name] += weight * len(labels)
            return found, by_image

        for group in groups:
            other = torch.arange(len(group[1])) % 5 == 4
            clean, others = (tuple(part[rows] for part in group) for rows in (~other, other))
            found, _ = train(clean[0], clean[1], "main", weights["clean"])
            total = added(total, found)
            start = start_of(others, epsilon)
            begun = (others[0] + start).clamp(*bounds)
            found, by_image = train(begun, others[1], "adversarial", weights["attack"])
            total = added(total, found)
            moved = (start + alpha * up(by_image)).clamp(-epsilon, epsilon)
            found, _ = train(
                (others[0] + moved).clamp(*bounds), others[1], "adversarial", weights["adversarial"]
            )
            total = added(total, found)
        world.step({name: gradient / sums[name] for name, gradient in total.items()})
        world.remember(seen)
    return world
