"""Curvature against PyHessian, curvlinops and hessian-eigenthings: ``python -m benchmarks.sharpness --json FILE``.

A trained ResNet-20 and 1,000 images of CIFAR-10 (``--data-dir``; synthetic ones without it), or with ``--subject
digits --rounds 40`` a small network whose dense float64 Hessian is the truth. Every tool gets the same model, batch
and threads and must reach the same **true** error: five eigenvalues to 1e-3, the trace to 1 %; PyHessian also computes
a density, and ours must be no further from the truth: in Wasserstein distance where the spectrum is known, otherwise
by the expected error of its mean, whose true value is the trace. PyHessian is stopped after ``--peer-seconds``, which
makes its time a lower bound; the time of its trace is then the measured time per sample times the number of samples
that the measured spread requires. Each line says so, and ``together`` sums them.

Ratios are the peer's figure over ours, so more than 1 is better; only rows named ``product …`` and ``graph …`` give
ours over the peer's. PyHessian's density calls ``torch.eig``, which torch removed, so it gets a replacement based on
``torch.linalg.eigh``. Every peer uses the loosest setting that reaches the error, found untimed. The other two peers
are skipped if not installed (``--peers FOLDER``).

On a GPU: ``--subject resnet18 --device cuda`` (32 pixels), ``--subject resnet50 --device cuda`` (224 pixels), each
should finish within two minutes; not measured yet.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from benchmarks import sharpness_peers as peers
from benchmarks.harness import Options, Row, interleaved, publish
from benchmarks.sharpness_peers import EIGEN_ERROR, TOP, TRACE_ERROR, Answer, eigen_error
from benchmarks.sharpness_subjects import SUBJECTS, Subject, Truth, dense_truth, long_truth
from conadv_lab import cli
from conadv_lab.sharpness.operators.matrices import Hessian
from conadv_lab.sharpness.problem.arithmetic import full_float32
from conadv_lab.sharpness.problem.problem import Problem
from conadv_lab.sharpness.report.crosscheck import pyhessian, their_product
from conadv_lab.sharpness.spectrum.density import Density, density
from conadv_lab.sharpness.spectrum.eigen import eigenpairs, orthonormal
from conadv_lab.sharpness.spectrum.exact import exact_trace
from conadv_lab.sharpness.spectrum.trace import Probes

LIMITS = {"digits": float("inf"), "resnet18": 8.0, "resnet50": 8.0}
"""Seconds per task of a peer, so that everything ends within two minutes on a GPU."""


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a call, after waiting for the GPU."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def distance(truth: Truth, nodes: np.ndarray, weights: np.ndarray) -> float:
    """The Wasserstein distance between a density and the true spectrum."""
    return float(wasserstein_distance(truth.spectrum, nodes, None, weights))


def expected_error(ours: "Ours", truth: Truth, draws: int = 8) -> float:
    """The relative standard error of our density's mean, for a spectrum too large to compute.

    With sign vectors z, a density's mean is zᵀHz/n, a sample of tr(H)/n; ours has exact outliers, and the spread of
    the rest is sampled here, untimed.
    """
    probes = Probes(ours.operator, orthonormal(ours.top.vectors), seed=123)
    probes.draw(draws)
    return float(np.std(probes.forms, ddof=1)) / abs(truth.trace) / len(ours.density.nodes) ** 0.5


class Ours:
    """Top five, trace and density of a fresh problem, sharing work where possible; timed separately."""

    def __init__(self, subject: Subject, seed: int, probes: int, steps: int, check: bool) -> None:
        self.setup, self.problem = timed(subject.problem)
        self.operator = Hessian(self.problem, memory_budget=subject.budget)
        self.top_seconds, self.top = timed(lambda: eigenpairs(self.operator, TOP, seed=seed, check=check))
        self.trace_seconds, self.trace = timed(lambda: exact_trace(self.problem))
        known = (self.top.values, orthonormal(self.top.vectors))
        self.density_seconds, self.density = timed(
            lambda: density(self.operator, known=known, probes=probes, steps=steps, seed=seed)
        )

    @property
    def seconds(self) -> float:
        return self.setup + self.top_seconds + self.trace_seconds + self.density_seconds

    def distance(self, truth: Truth) -> float:
        """Products of the density, all probes together."""
        found: Density = self.density
        nodes, weights = np.concatenate(found.nodes), np.concatenate(found.weights)
        return distance(truth, nodes, weights)


def graph_bytes(build: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that a graph holds."""
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # or a freed storage's address could be another's

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = build()
    del kept
    return sum(seen.values())


def product_rows(subject: Subject, rounds: int) -> list[Row]:
    """The cost of one product: ours with kept and with streamed graphs, PyHessian's, and other installed peers'."""
    problem, model, (inputs, labels) = subject.problem(), subject.model, subject.batch
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).to(problem.device)
    # Before the peers allocate memory.
    truth = Hessian(subject.problem(torch.float64), planned=1) @ vector.double()
    kept, streamed = Hessian(problem, memory_budget=subject.budget), Hessian(problem, memory_budget=0)
    first, _ = timed(lambda: kept @ vector)
    half = len(labels) // 2
    halves = [(inputs[:half], labels[:half]), (inputs[half:], labels[half:])]

    def gradient() -> Any:
        return torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), [*model.parameters()])

    with pyhessian(problem) as theirs, pyhessian(Problem(model, problem.criterion, halves)) as loading:
        calls: dict[str, Callable[[], Any]] = {
            "gradient": gradient,
            "product kept": lambda: kept @ vector,
            "product streamed": lambda: streamed @ vector,
            "pyhessian": lambda: their_product(theirs, problem, vector),
            "pyhessian streamed": lambda: their_product(loading, problem, vector),
        }
        for name, make in (("curvlinops", _curvlinops), ("hessian-eigenthings", _eigenthings)):
            try:
                calls[name] = make(subject, vector)
            except ImportError:
                print(f"{name} is not installed: not measured", file=sys.stderr)
        for name, call in list(calls.items())[1:]:
            off = float((call() - truth).norm() / truth.norm())
            print(f"{name}: the product is {off:.1e} from the one in float64", flush=True)
            if off > 1e-2:  # in float32 every tool is 1e-5 to 1e-3 off for a trained network
                raise RuntimeError(f"{name} returns a different product")
        times = interleaved(calls, rounds, cuda=problem.device.type == "cuda")
    rows = [times.row("gradient"), times.row("product kept", "pyhessian")]
    rows += [times.row("product streamed", "pyhessian streamed")]
    rows += [times.row(name) for name in list(calls)[3:]]
    rows.append(Row("set-up of kept", first / times.median("product kept") - 1, "products"))
    for name in list(calls)[1:]:
        rows.append(Row(f"{name} in gradients", times.median(name) / times.median("gradient"), "gradients"))
    return rows


def _curvlinops(subject: Subject, vector: Tensor) -> Callable[[], Tensor]:
    operator = peers.curvlinops_operator(subject)
    return lambda: operator @ vector


def _eigenthings(subject: Subject, vector: Tensor) -> Callable[[], Tensor]:
    operator = peers.eigenthings_operator(subject)
    return lambda: operator.matvec(vector)


def memory_rows(subject: Subject) -> list[Row]:
    """Memory of the kept graphs, and the process's peak so far."""
    problem = subject.problem()
    inputs, targets, _ = next(problem.data())
    operator = Hessian(problem)
    ours = graph_bytes(lambda: operator._prepare(*operator._variables(inputs, targets)))

    def build() -> None:
        with pyhessian(problem):
            pass

    theirs, peak = graph_bytes(build), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if problem.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return [
        Row("graph kept", ours / 1e6, "MB", "pyhessian", ours / theirs),
        Row("peak of the process, all sides", peak / 1e6, "MB"),
    ]


def other_rows(subject: Subject, truth: Truth, limit: float) -> list[Row]:
    """The other two peers on the tasks that they support."""
    rows = []
    for peer, tasks in {
        "curvlinops": (peers.curvlinops_top, peers.curvlinops_trace),
        "hessian-eigenthings": (peers.eigenthings_top, peers.eigenthings_trace),
    }.items():
        for what, task in zip(("top-5", "trace"), tasks, strict=True):
            try:
                answer = task(subject, truth, 0, limit)
            except ImportError:
                continue
            print(f"{peer}, {what}: {answer}", flush=True)
            bound = " (at least)" if answer.error is None else ""
            rows.append(Row(f"{peer} {what}{bound}", 1e3 * answer.seconds, "ms"))
            rows.append(Row(f"{peer} {what} products{bound}", answer.products, "products"))
    return rows


def enough_probes(measure: Callable[[int, int], Ours], truth: Truth, wanted: float, seeds: range) -> int:
    """The smallest number of probes for which our density's mean distance is at most ``wanted``."""
    for probes in range(1, 17):
        if np.mean([measure(seed, probes).distance(truth) for seed in seeds]) <= wanted:
            return probes
    return 16


@dataclass(frozen=True)
class SharpnessOptions(Options):
    rounds: int = 3
    subject: Literal["resnet20", "digits", "resnet18", "resnet50"] = "resnet20"  # The network to measure.
    data_dir: Path | None = None  # A folder with CIFAR-10, see conadv_lab.data.cifar.
    examples: int | None = None  # Images in the batch; None: the subject's default.
    epochs: int | None = None  # Epochs of training on them; None: the subject's default.
    threads: int = 2  # Of torch.
    device: str = "cpu"  # cpu or cuda.
    peers: Path | None = None  # Folder with curvlinops and hessian-eigenthings.
    peer_seconds: float | None = None
    """Time limit per task of a peer; None: 30, but 8 for resnet18 and resnet50, and no limit for digits."""
    check: bool = True  # Let ours search for missed eigenvalues too.


def main(words: Sequence[str] | None = None) -> None:
    asked = cli.asked(SharpnessOptions, words, "benchmarks.sharpness", __doc__)
    if torch.device(asked.device).type == "cuda":
        torch.cuda.init()
    with full_float32():  # otherwise a GPU's convolutions are too inaccurate for any side
        _main(asked)


def _main(asked: SharpnessOptions) -> None:
    torch.set_num_threads(asked.threads)
    if asked.peers:
        sys.path.append(str(asked.peers))  # last, so that none of the project's packages is replaced
    make, examples, epochs = SUBJECTS[asked.subject]
    subject = make(asked.examples or examples, asked.epochs or epochs, asked.data_dir, asked.device)
    small = asked.subject == "digits"
    seeds = range(3 if small else 1)
    limit = asked.peer_seconds or LIMITS.get(asked.subject, 30.0)
    truth = (dense_truth if small else long_truth)(subject)
    problem = subject.problem()
    print(
        f"{subject.told}: {problem.size} weights, λ₁ = {truth.top[0]:.4g}, λ₅ = {truth.top[4]:.4g}, "
        f"trace = {truth.trace:.4g}, loss {problem.initial_loss:.3g}; the truth is {truth.told}", flush=True,
    )  # fmt: skip

    steps = 100 if small else 20  # PyHessian's default, or fewer steps to end within minutes
    eigen = [peers.pyhessian_top(subject, truth, seed, limit) for seed in seeds]
    print(f"pyhessian, top-5: {eigen[0]}", flush=True)
    trace = peers.pyhessian_trace(subject, truth, 0, limit)
    print(f"pyhessian, trace: {trace}", flush=True)
    densities = [peers.pyhessian_density(subject, steps, seed) for seed in seeds]
    if small:
        wanted = float(np.mean([distance(truth, nodes, weights) for _, nodes, weights in densities]))
    else:  # its mean is one trace sample, whose spread gave the number of samples above
        wanted = TRACE_ERROR * trace.products**0.5 / 1.96
    print(f"pyhessian, density: {densities[0][0]:.3g} s, {steps} products, distance {wanted:.3g}", flush=True)

    measure = partial(_ours, subject, 20, asked.check)
    if small:
        probes = enough_probes(measure, truth, wanted, seeds)
        ours = [measure(seed, probes) for seed in seeds]
    else:
        ours = [measure(seed, 1) for seed in seeds]
    mine = float(np.mean([o.distance(truth) if small else expected_error(o, truth) for o in ours]))
    errors = [eigen_error(o.top.values, truth) for o in ours]
    far = [abs(o.trace.value / truth.trace - 1) for o in ours if o.trace.value is not None]
    # For a large matrix both errors are estimates; ours has the smaller norm, as outliers are treated exactly.
    if max(errors) > EIGEN_ERROR or max(far) > TRACE_ERROR or (small and mine > wanted):
        raise RuntimeError(f"ours missed the requested error: {errors}, {far}, {mine}")
    print(f"ours: true error of the five {max(errors):.1e}, distance {mine:.3g}", flush=True)
    rows = _compared(ours, eigen, trace, densities, mine, wanted)
    for one in ours:
        one.operator.release()
    rows += product_rows(subject, asked.rounds) + memory_rows(subject) + other_rows(subject, truth, limit)
    publish(rows, asked.json)


def _ours(subject: Subject, steps: int, check: bool, seed: int, probes: int) -> Ours:
    return Ours(subject, seed, probes, steps, check)


def _compared(
    ours: list[Ours], eigen: list[Answer], trace: Answer, densities: list[Any], mine: float, wanted: float
) -> list[Row]:
    """Our times and PyHessian's, per task and in total."""
    top, spent = median(o.top.products for o in ours), median(e.products for e in eigen)
    sides = {
        "top-5 to 1e-3": ([o.setup + o.top_seconds for o in ours], [e.seconds for e in eigen]),
        "trace to 1 %": ([o.trace_seconds for o in ours], [trace.seconds]),
        "density": ([o.density_seconds for o in ours], [d[0] for d in densities]),
        "together": (
            [o.seconds for o in ours],
            [e.seconds + trace.seconds + d[0] for e, d in zip(eigen, densities, strict=True)],
        ),
    }
    bound = " (PyHessian stopped: at least)" if any(e.error is None for e in eigen) else ""
    rows = [
        Row(name + (bound if name.startswith("top-5") else ""), 1e3 * median(our), "ms", "pyhessian",
            median(their) / median(our))
        for name, (our, their) in sides.items()
    ]  # fmt: skip
    return [
        *rows,
        Row(f"top-5 products{bound}", top, "products", "pyhessian", spent / top),
        Row("top-5 products of the check", median(o.top.check_products for o in ours), "products"),
        Row("trace gradients", median(o.trace.gradients for o in ours), "gradients"),
        Row("pyhessian trace samples", trace.products, "products"),
        Row("density products", median(o.density.products for o in ours), "products"),
        Row("density distance", mine, "1", "pyhessian", wanted / mine),
    ]


if __name__ == "__main__":
    main()
