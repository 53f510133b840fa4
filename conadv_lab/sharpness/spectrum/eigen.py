"""Eigenpairs by Lanczos with full reorthogonalisation; the same run also serves the density."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from conadv_lab.mistakes import require

ENDS = ("top", "bottom")


class Symmetric(Protocol):
    """What the algorithms need from an operator."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


def normal_vector(operator: Symmetric, seed: int, index: int) -> Tensor:
    """A standard normal vector of shape ``(size,)``, sampled on the CPU: the same on every device and rank."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    drawn = torch.randn(operator.size, generator=generator, dtype=operator.dtype, device="cpu")
    return drawn.to(operator.device)


def orthonormal(vectors: Tensor) -> Tensor:
    """Orthonormal rows with the same span as the given rows."""
    return torch.linalg.qr(vectors.T).Q.T


class Lanczos:
    """An orthonormal basis V of a Krylov space and the tridiagonal T = VᵀAV, grown one product at a time.

    Every new vector is orthogonalised twice against all earlier ones (and against ``against``), so no ghost
    copies of eigenvalues appear (Paige 1972; Parlett 1998, ch. 13). T is diagonalised in float64.

    Attributes:
        alphas, betas: T's diagonal (j,) and the norms that follow each step (j,).
        products: number of products so far.
    """

    def __init__(self, operator: Symmetric, start: Tensor, against: Tensor | None = None) -> None:
        if torch.is_autocast_enabled(operator.device.type):
            raise ValueError(
                "autocast is on around Lanczos, which would corrupt its basis; allowed: around the creation of the "
                "Problem, which applies it to the model only"
            )
        self.operator, self.against = operator, against
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self._basis = torch.empty((8, operator.size), dtype=operator.dtype, device=operator.device)
        self._next = self._orthogonal(start.to(operator.device, operator.dtype))
        self._next = self._next / self._next.norm()

    @property
    def products(self) -> int:
        return len(self.alphas)

    @property
    def room(self) -> int:
        """The dimension of the space that can be explored."""
        return self.operator.size - (0 if self.against is None else self.against.shape[0])

    @property
    def basis(self) -> Tensor:
        """The basis vectors as rows, shape ``(products, size)``."""
        return self._basis[: self.products]

    def _orthogonal(self, vector: Tensor) -> Tensor:
        for _ in range(2):
            if self.against is not None:
                vector = vector - self.against.T @ (self.against @ vector)
            if self.alphas:
                vector = vector - self.basis.T @ (self.basis @ vector)
        return vector

    def step(self) -> None:
        """One product: one more row and column of T."""
        j = self.products
        if j == self._basis.shape[0]:
            self._basis = torch.cat([self._basis, torch.empty_like(self._basis)])
        self._basis[j] = self._next
        image = self.operator @ self._next
        self.alphas.append(float(image @ self._next))
        rest = self._orthogonal(image)
        beta = float(rest.norm())
        scale = max(map(abs, [*self.alphas, *self.betas]), default=0.0)
        if self.products < self.room and beta <= 10 * torch.finfo(self.operator.dtype).eps * scale:
            # An invariant subspace: continue with a new vector.
            beta, rest = 0.0, self._orthogonal(normal_vector(self.operator, 7, j))
        self.betas.append(beta if self.products < self.room else 0.0)
        self._next = rest / rest.norm().clamp_min(torch.finfo(rest.dtype).tiny)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values (j,) ascending, eigenvectors of T (j, j) in columns, residual norms (j,)."""
        if len(self.alphas) == 1:
            values, vectors = np.array(self.alphas), np.ones((1, 1))
        else:
            values, vectors = eigh_tridiagonal(np.array(self.alphas), np.array(self.betas[:-1]))
        return values, vectors, np.abs(self.betas[-1] * vectors[-1])

    def vectors(self, coefficients: np.ndarray) -> Tensor:
        """Ritz vectors as rows (k, size) for columns of T's eigenvectors (j, k), normalised."""
        mixed = (
            torch.as_tensor(coefficients.T.copy(), dtype=self.basis.dtype, device=self.basis.device)
            @ self.basis
        )
        return mixed / mixed.norm(dim=1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to resume from here."""
        numbers = torch.tensor([self.alphas, self.betas], dtype=torch.float64, device="cpu")
        return {"numbers": numbers, "basis": self.basis.clone(), "next": self._next}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Resume from a ``state()``."""
        self.alphas, self.betas = state["numbers"].tolist()
        self._basis = state["basis"].to(self.operator.device)
        self._next = state["next"].to(self.operator.device)


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs, from the requested end inwards.

    Attributes:
        values: (k,) eigenvalues, outermost first: the largest first for ``top``.
        vectors: (k, size) unit eigenvectors as rows.
        residuals: (k,) ‖Av − λv‖ by Lanczos' recurrence.
        bounds: (k,) bound of each value's error, including rounding.
        products: number of products, including the check.
        check_products: products of the check for missed eigenvalues; 0 without the check.
        converged: every bound is within the tolerance.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    bounds: np.ndarray
    products: int
    check_products: int
    converged: bool


def error_bounds(values: np.ndarray, residuals: np.ndarray, eps: float) -> np.ndarray:
    """Bounds of the Ritz values' errors: residual, or residual² / gap if smaller, plus rounding.

    The Kato–Temple bound (Parlett 1998, thm 11.7.1) needs the distance to the rest of the spectrum. Only Ritz
    values are known, so we use half the distance to the nearest other one.
    """
    gaps = np.full(len(values), np.inf)
    distance = np.diff(values)
    gaps[1:] = np.minimum(gaps[1:], distance)
    gaps[:-1] = np.minimum(gaps[:-1], distance)
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = np.where(np.isfinite(gaps), residuals**2 / (gaps / 2), residuals)
    bounds = np.minimum(residuals, np.nan_to_num(squared, nan=0.0, posinf=np.inf))
    return bounds + 8 * eps * np.abs(values).max()


def tolerances(values: np.ndarray, scale: float, tol: float) -> np.ndarray:
    """The error allowed for each value: relative to it, but to at least a hundredth of ``scale``."""
    return tol * np.maximum(np.abs(values), 0.01 * scale)


def _wanted(
    run: Lanczos, k: int, end: str, eps: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values, T-eigenvectors, residuals and bounds of the ``k`` outermost Ritz pairs at one end.

    ``eps`` is the rounding included in the bounds, by default that of the vectors' dtype: a run in low precision then
    stops when more steps do not help, and its final bounds account for the precision.
    """
    values, coefficients, residuals = run.ritz()
    bounds = error_bounds(values, residuals, eps or torch.finfo(run.operator.dtype).eps)
    order = np.argsort(values)[::-1][:k] if end == "top" else np.argsort(values)[:k]
    return values[order], coefficients[:, order], residuals[order], bounds[order]


def _roundoff(operator: Symmetric) -> float:
    return max(float(getattr(operator, "roundoff", 0.0)), torch.finfo(operator.dtype).eps)


def _done(run: Lanczos, k: int, end: str, tol: float) -> bool:
    values, _, _, bounds = _wanted(run, k, end)
    scale = max(map(abs, run.alphas))
    return len(values) == k and bool((bounds <= tolerances(values, scale, tol)).all())


def eigenpairs(
    operator: Symmetric,
    k: int = 1,
    *,
    end: str = "top",
    tol: float = 1e-3,
    check: bool = True,
    max_products: int | None = None,
    seed: int = 0,
    run: Lanczos | None = None,
    on_step: Callable[[Lanczos], None] | None = None,
) -> Eigenpairs:
    """The ``k`` largest or smallest eigenvalues (signed, not by magnitude) with bounds of their errors.

    Lanczos runs until each requested value's bound is within ``tol``. A single start finds one vector of a
    multiple eigenvalue and can miss eigenvectors that it is nearly orthogonal to; so with ``check`` a second start,
    kept orthogonal to those found, runs until its largest value is clearly on one side of the k-th, and
    adds what it finds. Its cost, about that of the first run, is in ``check_products``.

    Args:
        operator: a symmetric map.
        tol: relative error allowed for each value.
        max_products: at most this many for the first run; ``None`` allows 300 (or ``size``).
        run: a Lanczos run to use and extend, shared with other measures.
        on_step: called after each product, to save or to show progress.

    Raises:
        ValueError: ``k`` or ``tol`` out of range.

    >>> from types import SimpleNamespace
    >>> class Diagonal(SimpleNamespace):
    ...     def __matmul__(self, vector):
    ...         return self.values * vector
    >>> operator = Diagonal(size=4, dtype=torch.float64, device=torch.device("cpu"),
    ...                     values=torch.tensor([4.0, 4.0, 1.0, -3.0], dtype=torch.float64))
    >>> eigenpairs(operator, k=2).values.round(6)
    array([4., 4.])
    """
    require(end in ENDS, "end", end, "'top' or 'bottom'")
    require(1 <= k <= operator.size, "k", k, f"a whole number from 1 to {operator.size}")
    require(0 < tol < 1, "tol", tol, "a number between 0 and 1")
    limit = min(operator.size, max_products or 300)
    run = run or Lanczos(operator, normal_vector(operator, seed, 0))
    while run.products < limit and not (run.products >= k and _done(run, k, end, tol)):
        run.step()
        if on_step:
            on_step(run)
    values, coefficients, residuals, bounds = _wanted(run, k, end, _roundoff(operator))
    vectors = run.vectors(coefficients)
    spent = 0
    if check and run.room > run.products:
        values, vectors, residuals, bounds, spent = _with_missed(
            operator, (values, vectors, residuals, bounds), run.products, k, end, tol, seed
        )
    allowed = tolerances(values, max(map(abs, run.alphas)), tol)
    converged = len(values) == k and bool((bounds <= allowed).all())
    return Eigenpairs(values, vectors, residuals, bounds, run.products + spent, spent, converged)


def _with_missed(
    operator: Symmetric,
    found: tuple[np.ndarray, Tensor, np.ndarray, np.ndarray],
    first_products: int,
    k: int,
    end: str,
    tol: float,
    seed: int,
) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray, int]:
    """The pairs found, plus any beyond the k-th that a second start in their complement reveals."""
    values, vectors, residuals, bounds = found
    sign = 1.0 if end == "top" else -1.0
    spent = 0
    for attempt in range(1, k + 1):
        basis = orthonormal(vectors)
        run = Lanczos(operator, normal_vector(operator, seed, attempt), against=basis)
        limit = min(run.room, 2 * first_products + 20)
        fewest = min(limit, max(4, math.ceil(first_products / 2)))
        while run.products < limit:
            run.step()
            new, _, new_residuals, _ = _wanted(run, 1, end)
            above = sign * (new[0] - values[-1]) - bounds[-1] - 0.1 * tol * abs(values[-1])
            if run.products >= fewest and (
                above + new_residuals[0] <= 0 or (above > 0 and _done(run, 1, end, tol))
            ):
                break
        new, coefficients, new_residuals, new_bounds = _wanted(run, 1, end, _roundoff(operator))
        spent += run.products
        if sign * (new[0] - values[-1]) <= bounds[-1] + 0.1 * tol * abs(values[-1]):
            return values, vectors, residuals, bounds, spent
        order = np.argsort(-sign * np.append(values, new), kind="stable")[:k]
        values = np.append(values, new)[order]
        residuals = np.append(residuals, new_residuals)[order]
        bounds = np.append(bounds, new_bounds)[order]
        chosen = torch.as_tensor(order.copy(), device=vectors.device)
        vectors = torch.cat([vectors, run.vectors(coefficients)])[chosen]
    return values, vectors, residuals, bounds, spent
