"""Measures read off the Hessian's spectrum."""

from typing import Any

import torch

from conadv_lab.sharpness.measures.study import Outcome, Study, register
from conadv_lab.sharpness.problem.precision import trusted
from conadv_lab.sharpness.spectrum.density import effective_dimension
from conadv_lab.sharpness.spectrum.eigen import Eigenpairs
from conadv_lab.sharpness.spectrum.trace import (
    PILOT,
    Estimate,
    controlled_trace,
    deflated_trace,
    frobenius,
    hutch_pp,
    xtrace,
)


def _told(study: Study, found: Eigenpairs) -> dict[str, object]:
    return {
        "converged": found.converged,
        "residual": [float(r) for r in found.residuals],
        "tolerance": study.settings.tol,
        "check_products": found.check_products,
        "matrix": "Hessian",
    }


@register("top_eigenvalue")
def top_eigenvalue(study: Study) -> Outcome:
    """λmax of the Hessian, by Lanczos (the sharpness of Jastrzębski et al. 2019 and Cohen et al. 2021).

    A layer-wise rescaling that keeps a ReLU network's function can change it arbitrarily (Dinh et al. 2017, thm 4).
    """
    found = study.eigen(1)
    return Outcome(float(found.values[0]), float(found.bounds[0]), found.products, _told(study, found))


@register("top_eigenvalues")
def top_eigenvalues(study: Study) -> Outcome:
    """The ``k`` largest eigenvalues of the Hessian, largest first; each changes as λmax does."""
    found = study.eigen(study.settings.k)
    return Outcome(found.values.tolist(), found.bounds.tolist(), found.products, _told(study, found))


@register("bottom_eigenvalue")
def bottom_eigenvalue(study: Study) -> Outcome:
    """λmin of the Hessian, signed: below zero there is a direction of descent (Alain et al. 2019).

    Its sign survives any smooth reparametrisation at a critical point; its size does not.
    """
    found = study.eigen(1, "bottom")
    return Outcome(float(found.values[0]), float(found.bounds[0]), found.products, _told(study, found))


@register("trace")
def trace(study: Study) -> Outcome:
    """tr(H): exact where the network's graph proves it can be, else estimated until accurate enough.

    Exact: see :func:`~conadv_lab.sharpness.spectrum.exact.exact_trace`. Estimated: Hutchinson (1990) on the complement
    of a Lanczos basis, with the Gauss–Newton matrix as control variate if its trace is exact and this is cheaper;
    interval by Stein (1945). Changes with any rescaling of the weights.
    """
    exact = study.exact_hessian
    if exact.value is not None:
        return Outcome(exact.value, _rounding(study, exact.value), 0, _exactly("Hessian", exact.gradients))
    s, control = study.settings, study.exact_ggn
    asked: dict[str, Any] = {"accuracy": s.accuracy, "confidence": s.confidence, "max_samples": s.max_samples}
    probes, run = study.probes, study.lanczos
    known = float(sum(run.alphas[: study.deflated]))
    if study.deflated >= study.problem.size:
        found = Estimate(known, 0.0, run.products, 0, True)
    elif control.value is not None:
        found = controlled_trace(
            study.hessian, study.ggn, control.value, run, deflate=study.deflated, probes=probes, **asked
        )
    else:
        found = deflated_trace(study.hessian, run=run, deflate=0, probes=probes, known=known, **asked)
    told = {
        "method": "deflated Hutchinson",
        "control_variate": control.value is not None,
        "samples": found.samples,
        "not_exact_because": list(exact.refusals),
        "converged": found.converged,
        "matrix": "Hessian",
        **asked,
    }
    return Outcome(found.value, _with_rounding(study, found), found.products, told)


@register("ggn_trace")
def ggn_trace(study: Study) -> Outcome:
    """tr(G) of the Gauss–Newton matrix (for cross-entropy: of the Fisher matrix), exact for known layers.

    Never negative for a convex loss. Changes with any rescaling of the weights.
    """
    exact = study.exact_ggn
    if exact.value is not None:
        return Outcome(exact.value, _rounding(study, exact.value), 0, _exactly("GGN", exact.gradients))
    s = study.settings
    found = deflated_trace(
        study.ggn, deflate=s.deflate, accuracy=s.accuracy, confidence=s.confidence,
        max_samples=s.max_samples, seed=study.seed,
    )  # fmt: skip
    told = {"method": "deflated Hutchinson", "not_exact_because": list(exact.refusals), "matrix": "GGN"}
    return Outcome(
        found.value, _with_rounding(study, found), found.products,
        told | {"converged": found.converged, "samples": found.samples, "confidence": s.confidence},
    )  # fmt: skip


@register("frobenius_norm")
def frobenius_norm(study: Study) -> Outcome:
    """‖H‖_F = √Σλ², from the products of trace and eigenvalues. Changes with any rescaling."""
    study.probes.draw(min(PILOT, study.settings.max_samples) if study.deflated < study.problem.size else 0)
    found = frobenius(study.lanczos, study.probes, study.deflated, study.settings.confidence)
    told = {"matrix": "Hessian", "samples": found.samples, "confidence": study.settings.confidence}
    return Outcome(found.value, found.error, found.products, told)


@register("density")
def spectral_density(study: Study) -> Outcome:
    """The Hessian's spectral density (Ghorbani et al. 2019), outliers exact, the bulk by quadrature.

    ``value``: ``grid`` (eigenvalues), ``density``, ``nodes`` and ``weights``; ``error``: the band ``low``,
    ``high``, pointwise over probes. Its scale changes with any rescaling of the weights.
    """
    found = study.spectrum
    value = {
        "grid": found.grid.tolist(),
        "density": found.density.tolist(),
        "nodes": [n.tolist() for n in found.nodes],
        "weights": [w.tolist() for w in found.weights],
    }
    told = {"sigma": found.sigma, "matrix": "Hessian", "confidence": study.settings.confidence}
    products = found.products + study.eigen(study.settings.k).products
    return Outcome(value, {"low": found.low.tolist(), "high": found.high.tolist()}, products, told)


@register("effective_dimension")
def dimension(study: Study) -> Outcome:
    """Σ λ⁺/(λ⁺ + z): how many directions the data determine (MacKay 1992; Maddox et al. 2020, eq. 3).

    The error is a standard error over the density's probes. Rescaling the weights changes it.
    """
    value, error = effective_dimension(study.spectrum, study.problem.size, study.settings.damping)
    products = study.spectrum.products + study.eigen(study.settings.k).products
    return Outcome(value, error, products, {"damping": study.settings.damping, "matrix": "Hessian"})


@register("trace_hutch_pp")
def trace_hutch_pp(study: Study) -> Outcome:
    """tr(H) by Hutch++ with 120 products; the error is a standard error. See `spectrum.trace.hutch_pp`."""
    found = hutch_pp(study.hessian, seed=study.seed)
    return Outcome(found.value, found.error, found.products, {"method": "Hutch++", "matrix": "Hessian"})


@register("trace_xtrace")
def trace_xtrace(study: Study) -> Outcome:
    """tr(H) by XTrace with 120 products; the error is a standard error. See `spectrum.trace.xtrace`."""
    found = xtrace(study.hessian, seed=study.seed)
    return Outcome(found.value, found.error, found.products, {"method": "XTrace", "matrix": "Hessian"})


def _rounding(study: Study, value: float) -> float:
    return abs(value) * trusted(study.problem.roundoff)


def _with_rounding(study: Study, found: Estimate) -> float:
    """The half-width over random vectors, plus the error of low precision or of a sum over all dimensions."""
    coarse = study.problem.roundoff > torch.finfo(torch.float32).eps
    return found.error + (_rounding(study, found.value) if coarse or not found.samples else 0.0)


def _exactly(matrix: str, gradients: float) -> dict[str, object]:
    return {"method": "exact", "matrix": matrix, "gradients": gradients, "converged": True}
