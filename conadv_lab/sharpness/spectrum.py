"""Measures read off the Hessian's spectrum."""

from conadv_lab.sharpness.eigen import Eigenpairs
from conadv_lab.sharpness.study import Outcome, Study, register


def _told(study: Study, found: Eigenpairs) -> dict[str, object]:
    return {
        "converged": found.converged,
        "residual": [float(r) for r in found.residuals],
        "tolerance": study.settings.tol,
        "check_products": found.check_products,
        "matrix": "Hessian",
        "reparametrisation": "moves with any rescaling of the weights, also one that keeps the function",
    }


@register("top_eigenvalue")
def top_eigenvalue(study: Study) -> Outcome:
    """λmax of the Hessian, by Lanczos (the sharpness of Jastrzębski et al. 2019 and Cohen et al. 2021).

    A layer-wise rescaling that keeps a ReLU network's function moves it at will (Dinh et al. 2017, thm 4).
    """
    found = study.eigen(1)
    return Outcome(float(found.values[0]), float(found.bounds[0]), found.products, _told(study, found))


@register("top_eigenvalues")
def top_eigenvalues(study: Study) -> Outcome:
    """The ``k`` largest eigenvalues of the Hessian, the largest first; each moves as λmax does."""
    found = study.eigen(study.settings.k)
    return Outcome(found.values.tolist(), found.bounds.tolist(), found.products, _told(study, found))


@register("bottom_eigenvalue")
def bottom_eigenvalue(study: Study) -> Outcome:
    """λmin of the Hessian, signed: below zero there is a direction of descent (Alain et al. 2019).

    Its sign survives any smooth reparametrisation at a critical point; its size does not.
    """
    found = study.eigen(1, "bottom")
    return Outcome(float(found.values[0]), float(found.bounds[0]), found.products, _told(study, found))
