"""What all curvature operators share: iterating over the data, and retaining graphs between products.

Each operator is the average over a data set, weighted by examples, so smaller last batches count correctly. A
product iterates over the batches. If a forward pass costs F, a gradient costs 3F. A *kept* graph costs 3F once (in
practice about one and a half products, as it also allocates memory) and then 6F, two gradients, per product; a
*streamed* product builds its graph and drops it: 9F, three gradients. So if more than one product is planned, graphs
are kept for as many batches as the memory budget allows, and the others are streamed. Both give the same bits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from conadv_lab.mistakes import require, unknown
from conadv_lab.sharpness.operators.cures import second_derivatives
from conadv_lab.sharpness.operators.symmetry import Symmetry, judge
from conadv_lab.sharpness.operators.twice import CheapTwice
from conadv_lab.sharpness.problem.arithmetic import full_float32
from conadv_lab.sharpness.problem.nests import first_tensor, take
from conadv_lab.sharpness.problem.problem import Problem

WRT = ("parameters", "inputs")
Product = Callable[[list[Tensor], bool], list[Tensor]]


class Operator:
    """A symmetric ``(size, size)`` map, applied by ``operator @ v`` to a vector of shape ``(size,)``.

    Args:
        problem: model, loss and batches, with the weights at its creation.
        wrt: ``"parameters"``, or ``"inputs"``: then the vector concatenates all inputs of all batches.
        memory_budget: total bytes for kept graphs; 0 streams every batch.
        planned: how many products will be computed; ``None``: many. With one, no graph is kept.

    Attributes:
        products: number of products so far, each over the whole data set.
        symmetry: how far they deviate from those of a symmetric matrix.
    """

    linear = False  # whether a product is linear in the backward pass's cotangent alone

    def __init__(
        self,
        problem: Problem,
        *,
        wrt: str = "parameters",
        memory_budget: int = 2**30,
        planned: int | None = None,
    ) -> None:
        if wrt not in WRT:
            raise unknown("wrt", wrt, WRT)
        require(memory_budget >= 0, "memory_budget", memory_budget, "a number of bytes of at least 0")
        require(planned is None or planned >= 1, "planned", planned, "a number of products of at least 1")
        self.problem, self.wrt = problem, wrt
        self.memory_budget = 0 if planned == 1 else memory_budget
        self.dtype, self.device = problem.dtype, problem.device
        self.products = 0
        self.symmetry, self._judged = Symmetry(problem.roundoff), False
        self.size = problem.size if wrt == "parameters" else self._input_size()
        self._kept: list[tuple[Product, float, torch.Size]] | None = None

    def _input_size(self) -> int:
        total = 0
        with self.problem.untouched():
            for inputs, _, _ in self.problem.data():
                if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
                    raise ValueError("wrt='inputs' needs batches whose inputs are one floating-point tensor")
                total += inputs.numel()
        return total

    @property
    def roundoff(self) -> float:
        """The relative error of a product: that of its arithmetic, or more if a larger one was observed."""
        seen = 0.0 if self.symmetry.plausible else self.symmetry.share
        return max(self.problem.roundoff, seen)

    @second_derivatives()
    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape ``(size,)`` or, column by column, ``(size, k)``."""
        if vector.ndim == 2:
            return torch.stack([self @ column for column in vector.unbind(1)], 1)
        require(vector.shape == (self.size,), "vector's shape", tuple(vector.shape), f"({self.size},)")
        vector = vector.to(self.device, self.dtype)
        if self._kept is None:
            # Separately, so that the loader shuffles in the same way below.
            with self.problem.untouched(), torch.enable_grad():
                self._kept = self._keep()
        # With kept graphs only, neither model nor loader runs, so nothing needs protection.
        all_kept = len(self._kept) == len(self.problem.batch_sizes)
        with full_float32() if all_kept else self.problem.untouched(), torch.enable_grad():
            result = self._sum(vector) if self.wrt == "parameters" else self._blocks(vector)
        self.products += 1
        self.symmetry.note(vector, result)
        if not self.symmetry.plausible and not self._judged:
            judge(self)
            self._judged = not self.symmetry.plausible
        return result

    def _sum(self, vector: Tensor) -> Tensor:
        parts = self.problem.split(vector)
        total: Tensor | None = None
        for product, share, kept, _ in self._rules():
            term = self.problem.flat(product(parts, kept))
            term = term if share == 1.0 else term.mul_(share)
            total = term if total is None else total.add_(term)
        assert total is not None
        return self.problem.reduced(total)

    def _blocks(self, vector: Tensor) -> Tensor:
        blocks, start = [], 0
        for product, share, kept, shape in self._rules():
            part = vector[start : start + shape.numel()].view(shape).to(self.problem.precision)
            blocks.append(share * product([part], kept)[0].reshape(-1).to(self.dtype))
            start += shape.numel()
        return torch.cat(blocks)

    def _rules(self) -> Iterator[tuple[Product, float, bool, torch.Size]]:
        """Each batch's product, share and shape of the first leaf: kept ones first, the others rebuilt."""
        kept = self._kept or []
        for product, share, shape in kept:
            yield product, share, True, shape
        if len(kept) == len(self.problem.batch_sizes):
            return
        for index, (inputs, targets, share) in enumerate(self.problem.data()):
            if index >= len(kept):
                leaves, run, targets = self._variables(inputs, targets)
                yield self._prepare(leaves, run, targets), share, False, leaves[0].shape

    def _keep(self) -> list[tuple[Product, float, torch.Size]]:
        kept: list[tuple[Product, float, torch.Size]] = []
        left = float(self.memory_budget)
        per_example = 0.0
        for index, (inputs, targets, share) in enumerate(self.problem.data()):
            if index == 0 and left > 0:
                per_example = self._bytes_per_example(inputs, targets)
            left -= per_example * first_tensor(inputs).shape[0]
            if left <= 0:
                break
            leaves, run, targets = self._variables(inputs, targets)
            kept.append((self._prepare(leaves, run, targets), share, leaves[0].shape))
        return kept

    def _variables(self, inputs: Any, targets: Any) -> tuple[list[Tensor], Callable[[], Tensor], Any]:
        """The leaves, a function that runs the model on them, and the targets."""
        leaves = parameters = self.problem.leaves()
        if self.wrt == "inputs":
            inputs = inputs.detach().requires_grad_()
            leaves, parameters = [inputs], [part.detach() for part in parameters]

        def run() -> Tensor:
            with CheapTwice(self.linear, not self.problem.differentiates):
                return self.problem.outputs(parameters, inputs)

        return leaves, run, targets

    def _bytes_per_example(self, inputs: Any, targets: Any) -> float:
        """Memory of a kept graph, counted on a few examples; storages of the weights are not counted."""
        # Index instead of slice: a slice would share, and count, the storage of the whole batch.
        few = torch.arange(min(4, first_tensor(inputs).shape[0]), device=first_tensor(inputs).device)
        leaves, run, some = self._variables(take(inputs, few), take(targets, few))
        known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                rule = self._prepare(leaves, run, some)
        except RuntimeError as error:
            if "saved tensor hooks" in str(error):  # not supported within torch.func's transforms
                return math.inf
            raise
        total = sum(seen.values())
        del rule
        return total / len(few)

    def _prepare(self, leaves: list[Tensor], run: Callable[[], Tensor], targets: Any) -> Product:
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The dense matrix, shape ``(size, size)``, from ``size`` products; for small problems and tests."""
        return torch.stack(
            [self @ row for row in torch.eye(self.size, dtype=self.dtype, device=self.device)], 1
        )

    def scipy(self) -> LinearOperator:
        """The same map for SciPy, on NumPy vectors."""
        kind = np.float64 if self.dtype == torch.float64 else np.float32

        def matvec(vector: np.ndarray) -> np.ndarray:
            flat = torch.from_numpy(np.ascontiguousarray(vector.reshape(-1), dtype=kind))
            return (self @ flat).cpu().numpy()

        return LinearOperator((self.size, self.size), matvec=matvec, rmatvec=matvec, dtype=kind)

    def release(self) -> None:
        """Free the kept graphs; the next product builds them again."""
        self._kept = None
