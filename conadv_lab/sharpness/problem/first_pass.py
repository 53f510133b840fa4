"""The first pass over a problem's data, which counts and checks everything at the cost of one gradient."""

import hashlib
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from conadv_lab.criteria import failing, kinds, logits
from conadv_lab.sharpness.problem.checks import check_labels, check_loss, check_mean, check_shape
from conadv_lab.sharpness.problem.classes import classes_of
from conadv_lab.sharpness.problem.effects import WAYS, bypassed, hidden, listed, reentrant
from conadv_lab.sharpness.problem.judging import GradientWatch, WholeOutput, alongside, takes_whole
from conadv_lab.sharpness.problem.means import Divisors, Mean
from conadv_lab.sharpness.problem.nests import copied, cpu, first_tensor, hash_into, take
from conadv_lab.sharpness.problem.precision import AutocastWatch

if TYPE_CHECKING:
    from conadv_lab.sharpness.problem.problem import Problem


def go_through(problem: "Problem", named: bool) -> None:
    """Count and check the data; store loss, gradient norm and weight norm. Costs one gradient."""
    digest, sizes = hashlib.sha256(), []
    leaves = problem.leaves()
    used = [False] * len(leaves)
    total, gradient = 0.0, torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
    problem.examples = 1
    problem.weights_of_batches = None
    problem.mean = Mean(problem.criterion, not problem.all_reduce or torch.distributed.get_world_size() == 1)
    watch = AutocastWatch(problem.device)
    with problem.untouched(), torch.enable_grad():
        for index, (inputs, targets, share) in enumerate(problem.data()):
            if index == 0:
                _meet(problem, leaves, inputs, targets)
            with watch:
                output = problem.outputs(leaves, inputs)
            problem.rows &= output.shape[:1] == (int(share),)
            check_labels(output, targets, problem.criterion, index)
            told = f"outputs {kinds(output)}, targets {kinds(targets)}"
            with failing(f"the criterion fails on batch {index} ({told})"), Divisors() as seen:
                loss = problem.criterion(output, targets)
            check_shape(loss)
            run = partial(_part, problem, leaves, inputs, targets)
            if index == 0:
                problem.classes = 0 if problem.whole else classes_of(output, targets, seen.labelled)
                _check_first(problem, loss, leaves, inputs, targets)
            # A random loss must not affect the loader's random numbers.
            with torch.random.fork_rng(_cuda(problem)):
                weight = problem.mean.add(seen, output, targets, int(share), run)
            check_loss(loss, index)
            grads = _gradients(problem, loss, leaves)
            used = [u or g is not None for u, g in zip(used, grads, strict=True)]
            total += weight * float(loss.detach())
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
            gradient += weight * problem.flat(parts)
            sizes.append(int(share))
            hash_into(digest, inputs, targets)
    if not sizes:
        raise ValueError("batches is empty; allowed: at least one (inputs, targets) pair")
    mine = [total, float(sum(sizes)), sum(problem.mean.weights)]
    summed = problem.reduced(cpu(mine))
    problem.examples, problem.counted = int(summed[1]), float(summed[2])
    problem.weights_of_batches = problem.mean.weights
    problem.batch_sizes = tuple(sizes)
    problem.autocast = watch.found
    problem.initial_loss = float(summed[0]) / problem.counted
    problem.gradient = problem.reduced(gradient) / problem.counted
    problem.data_hash = _hash_of_all(problem, digest.digest())
    _drop_unused(problem, used, named)


def _meet(problem: "Problem", leaves: list[Tensor], inputs: Any, targets: Any) -> None:
    """Find out how forward pass, criterion and outputs fit together, on a few examples of the first batch."""
    few = slice(0, 3)
    problem.differentiates = True  # until known
    with torch.random.fork_rng(_cuda(problem)):
        told = f"inputs {kinds(inputs)}, weights {str(leaves[0].dtype).removeprefix('torch.')}"
        with failing(f"the model fails on batch 0 ({told})"), GradientWatch() as watch:
            raw = problem.outputs(leaves, take(inputs, few), raw_alone=True)
        problem.differentiates = watch.found
        floating = [t for t in tree_leaves(raw) if isinstance(t, Tensor) and t.is_floating_point()]
        if floating:
            problem.criterion = alongside(problem.criterion, floating[0].device, floating[0].dtype)
        if takes_whole(problem.criterion, copied(raw), copied(take(targets, few))):
            problem.criterion = WholeOutput(problem.criterion)
    problem.mean.criterion = problem.criterion
    count = first_tensor(take(inputs, few)).shape[0]
    problem.rows = problem.whole or logits(raw).shape[:1] == (count,)


def _cuda(problem: "Problem") -> list[torch.device]:
    return [problem.device] if problem.device.type == "cuda" else []


def _check_first(problem: "Problem", loss: Tensor, leaves: list[Tensor], inputs: Any, targets: Any) -> None:
    if name := bypassed(loss, problem.model):
        raise ValueError(
            f"the loss reads the model's parameter {name!r} directly instead of through the model's outputs, so "
            "that term would count as a constant; allowed: a loss of outputs and targets; let the model return "
            "anything else it needs"
        )
    with torch.random.fork_rng(_cuda(problem)):
        check_mean(lambda x, y: problem.loss(leaves, x, y), inputs, targets)


def _gradients(problem: "Problem", loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(leaves)
    try:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    except RuntimeError as error:
        raise reentrant(error) or error from error
    for name, gradient in zip(problem.names, grads, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"parameter {name!r} has a sparse gradient, as from F.embedding(…, sparse=True); allowed: dense "
                "gradients, with sparse=False"
            )
    return grads


@torch.no_grad()
def _part(
    problem: "Problem", leaves: list[Tensor], inputs: Any, targets: Any, part: slice
) -> tuple[Any, Any]:
    return problem.outputs(leaves, take(inputs, part)), take(targets, part)


def _hash_of_all(problem: "Problem", mine: bytes) -> str:
    """One hash of the data of all ranks, in the ranks' order."""
    whole = [torch.tensor(list(mine), dtype=torch.uint8, device=problem.device)]
    if problem.all_reduce:
        whole *= torch.distributed.get_world_size()
        whole = [part.clone() for part in whole]
        torch.distributed.all_gather(whole, whole[0].clone())
        return hashlib.sha256(bytes(torch.cat(whole).tolist())).hexdigest()[:16]
    return mine.hex()[:16]


def _drop_unused(problem: "Problem", used: list[bool], named: bool) -> None:
    problem.left_out = tuple(n for n, u in zip(problem.names, used, strict=True) if not u)
    if not problem.left_out:
        return
    if moving := hidden(problem, problem.left_out):
        raise ValueError(
            f"parameter {listed(moving)} changes the loss, but no gradient reaches it: {WAYS}; "
            "fix the model or choose other parameters with params"
        )
    if named or len(problem.left_out) == len(problem.names):
        raise ValueError(
            f"no effect on the loss: parameter {listed(problem.left_out)}; choose others with params"
        )
    told = listed(problem.left_out)
    warnings.warn(f"left out (no effect on the loss): {told}", stacklevel=4)
    kept = [s for name, s in problem.slices().items() if name not in problem.left_out]
    problem.gradient = torch.cat([problem.gradient[s] for s in kept])
    problem.names = tuple(n for n in problem.names if n not in problem.left_out)
