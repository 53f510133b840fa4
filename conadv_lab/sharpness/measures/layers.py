"""Curvature of one layer at a time: the diagonal blocks of the Hessian."""

import math

from scipy import stats

from conadv_lab.sharpness.measures.study import Outcome, Study, register
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.spectrum.eigen import eigenpairs
from conadv_lab.sharpness.spectrum.exact import exact_trace
from conadv_lab.sharpness.spectrum.trace import sign_vector

SAMPLES = 64


def layers_of(problem: Problem) -> dict[str, list[str]]:
    """The chosen parameters' names by layer, the module that directly owns them.

    >>> from torch import nn, ones, tensor
    >>> layers_of(Problem(nn.Sequential(nn.Linear(2, 2)), nn.CrossEntropyLoss(), (ones(1, 2), tensor([0]))))
    {'0': ['0.weight', '0.bias']}
    """
    layers: dict[str, list[str]] = {}
    for name in problem.names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


@register("layer_top_eigenvalues")
def layer_top_eigenvalues(study: Study) -> Outcome:
    """λmax of each layer's diagonal block; never above the whole Hessian's. Changes with the layer's scale."""
    values, bounds, products, converged = {}, {}, 0, True
    s = study.settings
    for layer, names in layers_of(study.problem).items():
        block = Hessian(study.problem.restricted(names), memory_budget=s.memory_budget)
        found = eigenpairs(block, 1, tol=s.tol, check=s.check, seed=study.seed)
        values[layer], bounds[layer] = float(found.values[0]), float(found.bounds[0])
        products, converged = products + found.products, converged and found.converged
    return Outcome(values, bounds, products, {"matrix": "Hessian blocks", "converged": converged})


@register("layer_traces")
def layer_traces(study: Study) -> Outcome:
    """The trace of each layer's diagonal block; they sum to tr(H).

    Exact if the whole trace is. Otherwise one Hutchinson vector z serves all layers at once, as the expectation of
    z_l·(Hz)_l is the block's trace; 64 samples, the error a half-width at the configured confidence.
    """
    exact = study.exact_hessian if "exact_hessian" in vars(study) else exact_trace(study.problem)
    layers = layers_of(study.problem)
    if exact.value is not None:
        sums = {layer: sum(exact.by_parameter[n] for n in names) for layer, names in layers.items()}
        told = {"method": "exact", "gradients": exact.gradients, "matrix": "Hessian blocks"}
        return Outcome(sums, dict.fromkeys(sums, 0.0), 0, told)
    slices = study.problem.slices()
    samples: dict[str, list[float]] = {layer: [] for layer in layers}
    for index in range(SAMPLES):
        z = sign_vector(study.hessian, study.seed + 1, index)
        forms = (z * (study.hessian @ z)).double()
        for layer, names in layers.items():
            samples[layer].append(sum(float(forms[slices[n]].sum()) for n in names))
    quantile = float(stats.t.ppf((1 + study.settings.confidence) / 2, SAMPLES - 1))
    values = {layer: sum(kept) / SAMPLES for layer, kept in samples.items()}
    errors = {
        layer: quantile * math.sqrt(sum((x - values[layer]) ** 2 for x in kept) / (SAMPLES - 1) / SAMPLES)
        for layer, kept in samples.items()
    }
    told = {"method": "Hutchinson", "samples": SAMPLES, "matrix": "Hessian blocks"}
    return Outcome(values, errors, SAMPLES, told)
