"""Runs PyHessian safely on the same weights and batches, to print its numbers beside ours.

Yao et al. (2020), "PyHessian: Neural Networks Through the Lens of the Hessian". Its constructor accumulates into
``.grad`` and retains the graph there, it leaves the model in evaluation mode and uses the global random state; so we
run it on a deep copy, clear gradients before and after, and seed and restore the random state.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conadv_lab.sharpness.measures.results import Report
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.nests import to_device
from conadv_lab.sharpness.problem.problem import Problem


@dataclass(frozen=True)
class CrossCheck:
    """PyHessian's numbers.

    Attributes:
        product_difference: ‖ours − theirs‖ / ‖ours‖ for one product with the same vector, the most precise check.
        top_eigenvalue: theirs, by power iteration; largest in magnitude, so it may be negative.
        trace: theirs, the mean of ``samples`` quadratic forms.
        trace_error: its standard error.
        samples: number of quadratic forms.
    """

    product_difference: float
    top_eigenvalue: float
    trace: float
    trace_error: float
    samples: int


def _copied(problem: Problem) -> torch.nn.Module:
    """A copy of the model with the snapshot's weights, in which only the chosen parameters require gradients."""
    model = copy.deepcopy(problem.model).to(problem.precision)
    chosen = dict(zip(problem.names, problem.split(problem.weights()), strict=True))
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            parameter.data.copy_(chosen[name])
    return model.eval()


@contextmanager
def _at_home(device: torch.device) -> Iterator[None]:
    """PyHessian creates tensors on the default device, assumed to be the CPU, and moves them to the current GPU."""
    on_gpu = device.type == "cuda"
    with torch.device("cpu"), torch.cuda.device(device) if on_gpu else nullcontext():
        yield


@contextmanager
def pyhessian(problem: Problem, seed: int = 0) -> Iterator[Any]:
    """PyHessian's object for this problem; everything it changes is restored or discarded at the end.

    Raises:
        ValueError: batch norm in train mode, which PyHessian does not support, or inputs that are not one tensor.
    """
    from pyhessian import hessian

    if problem.bn != "eval":
        raise ValueError(f"the cross-check has bn {problem.bn!r}; allowed: 'eval', PyHessian's only mode")
    if len(problem.batch_sizes) > 1:
        problem.mean.require_alike("PyHessian")
    if problem.complex_names or problem.whole:
        what = "complex weights" if problem.complex_names else "a criterion of the whole output"
        raise ValueError(
            f"the cross-check has {what}; allowed: real weights and one output, as PyHessian requires"
        )
    batches = []
    with problem.untouched():
        for inputs, targets, _ in problem.data():
            if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
                raise ValueError("the cross-check needs batches of one input and one target tensor")
            batches.append((to_device(inputs, problem.device, problem.precision), targets))
    model = _copied(problem)
    source = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    with problem.untouched(), warnings.catch_warnings(), _at_home(problem.device):
        warnings.simplefilter("ignore")  # about backward(create_graph=True), whose leak is stopped below
        torch.default_generator.manual_seed(seed)
        theirs = hessian(model, problem.criterion, cuda=problem.device.type == "cuda", **source)
        try:
            # Its constructor reads parameters from gradients, which do not exist yet with a loader.
            if len(batches) > 1:
                theirs.params = [p for p in model.parameters() if p.requires_grad]
            yield theirs
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            theirs.gradsH = None


def their_product(theirs: Any, problem: Problem, vector: Tensor) -> Tensor:
    """PyHessian's product with a vector of shape ``(size,)``."""
    from pyhessian.utils import hessian_vector_product

    parts = [part.clone() for part in problem.split(vector)]
    if theirs.full_dataset:
        return problem.flat(theirs.dataloader_hv_product(parts)[1])
    return problem.flat(hessian_vector_product(theirs.gradsH, theirs.params, parts))


def cross_check(problem: Problem, *, samples: int = 100, seed: int = 0) -> CrossCheck:
    """Run PyHessian with settings that make its numbers comparable, at about 100 + ``samples`` products.

    >>> x, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    >>> problem = Problem(torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy, (x, y))
    >>> cross_check(problem, samples=3).product_difference < 1e-5
    True
    """
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(problem.size, generator=draw, dtype=problem.dtype, device="cpu").to(problem.device)
    ours = Hessian(problem, planned=1) @ vector
    with pyhessian(problem, seed) as theirs:
        product = their_product(theirs, problem, vector)
        values, _ = theirs.eigenvalues(maxIter=1000, tol=1e-5)
        # Its stopping rule divides by the running mean, so it stops at once if that is negative, even with tol 0.
        forms = np.array(theirs.trace(maxIter=samples, tol=-np.inf))
    return CrossCheck(
        float((ours - product).norm() / ours.norm()), float(values[0]), float(forms.mean()),
        float(forms.std(ddof=1) / np.sqrt(len(forms))), len(forms),
    )  # fmt: skip


def side_by_side(report: Report, check: CrossCheck) -> list[tuple[str, str, str]]:
    """Rows of (quantity, ours, PyHessian's) for printing."""
    rows = [("one product, same vector", "–", f"differs by {check.product_difference:.1e}")]
    if "top_eigenvalue" in report:
        ours = report["top_eigenvalue"]
        rows.append(("top eigenvalue", f"{ours.value:.6g} ± {ours.error:.1g}", f"{check.top_eigenvalue:.6g}"))
    if "trace" in report:
        ours = report["trace"]
        theirs = f"{check.trace:.6g} ± {check.trace_error:.2g} (standard error)"
        rows.append(("trace", f"{ours.value:.6g} ± {ours.error:.1g}", theirs))
    return rows
